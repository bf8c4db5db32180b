"""Faults of identities: where their pictures are, and how the lists write their ids."""

from collections import Counter, defaultdict

from baggage.faults import make_fault
from core.data.mvb import PARTS, SIDES


def identity_faults(pictures):
    """Identities in train and test, on one side of security alone, in gallery or probe alone.

    By what the data say, whether or not the pictures are there and readable: those are faults of their own. A side or
    a part that is empty altogether makes no fault of each identity, and an identity gets one fault.
    """
    parts, sides = defaultdict(Counter), defaultdict(set)
    for picture in pictures:
        parts[picture.identity][picture.part] += 1
        sides[picture.identity, picture.part == "train"].add(picture.source)
    names = {}
    for picture in pictures:
        names.setdefault(picture.identity, picture.name)
    filled = {part: any(part in seen for seen in parts.values()) for part in PARTS}
    both = {train: len(set().union(*(s for key, s in sides.items() if key[1] == train))) > 1 for train in (True, False)}
    faults = []
    for identity in sorted(parts, key=lambda identity: (isinstance(identity, str), identity)):
        seen, where = parts[identity], f"identity {names[identity]}"
        counts = ", ".join(f"{seen[part]} in {part}" for part in PARTS if seen[part])
        if seen["train"] and (seen["gallery"] or seen["probe"]):
            faults.append(make_fault("identity_in_train_and_test", where, f"pictures: {counts}"))
            continue  # what else is odd about it comes of that
        single = [part for part in ("gallery", "probe") if seen[part]]
        if len(single) == 1 and filled["gallery"] and filled["probe"]:
            lacks = "no probe asks for it" if single[0] == "gallery" else "its probes can find nothing"
            faults.append(
                make_fault("one_split", where, f"only in the {single[0]} (pictures: {seen[single[0]]}), {lacks}")
            )
        for train in (True, False):
            found = sides.get((identity, train), ())
            if len(found) == 1 and both[train] and (train or len(single) == 2):
                side = next(iter(found))
                part = "train" if train else "gallery and probe"
                faults.append(make_fault("one_source", where, f"in {part} only {SIDES[side]} ({side}): {counts}"))
    return faults


def compare_ids(checked, faults):
    """Ids of one list in another form than most of it, or than most of their bag: a fault for each entry."""
    kind, spelled = usual_ids(checked)
    for entry, picture in checked:
        given = entry.get("id")
        if given is None:
            continue
        if type(given) is not kind:
            words = ("a number", "text") if kind is str else ("a text", "numbers")
            message = f"id {given!r:.40} is {words[0]}, and others of this list are {words[1]}"
        elif kind is str and given != given.strip():
            message = f"id {given!r:.40} has blanks around it, which training takes off"
        elif kind is str and given != spelled[picture.identity]:
            message = f"id {given!r:.40} is the bag that this list else spells {spelled[picture.identity]!r:.40}"
        else:
            continue
        faults.append(make_fault("mixed_ids", picture.where, message))


def usual_ids(checked):
    """Of one list's entries: the type that most ids have, None where none has one; of texts {identity: the usual}."""
    types, spelled = Counter(), defaultdict(Counter)
    for entry, picture in checked:
        if entry.get("id") is not None:
            types[type(entry["id"])] += 1
            if isinstance(entry["id"], str):
                spelled[picture.identity][entry["id"].strip()] += 1
    if types[int] > types[str]:
        return int, {}
    usual = {identity: spellings.most_common(1)[0][0] for identity, spellings in spelled.items()}
    return str if usual else None, usual


def compare_lists(usual, faults):
    """Ids in another form than in other lists: one fault for a list. usual: {list: what `usual_ids` says of it}."""
    texts, known = [name for name, (kind, _) in usual.items() if kind is str], {}
    for name, (kind, spelled) in usual.items():
        if kind is int and texts:
            message = f"ids are numbers here, and text in {' and '.join(texts)}; training reads 1 and '0001' as one bag"
            faults.append(make_fault("mixed_ids", name, message))
        others = [one for one, text in spelled.items() if one in known and known[one][0] != text]
        if others:
            text, (before, where) = spelled[others[0]], known[others[0]]
            message = f"id {text!r:.40} is spelled {before!r:.40} in {where} (bags in two spellings: {len(others)})"
            faults.append(make_fault("mixed_ids", name, message))
        known = {one: (text, name) for one, text in spelled.items()} | known
