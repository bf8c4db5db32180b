"""Ways to damage what the readers read: bytes, and trees of plain values. The same generator makes the same damage."""

import copy

ODD = (
    None, True, False, 0, -1, 1.5, 10**18, 2**63, 10**400, -(10**400), 1e308, 1e-308, float("nan"), float("inf"), "",
    "x", "0", "../x", "/etc/passwd", "\ud800", "\x1b[31m", "\u202e", "a\nb", "é" * 300, [], [[]], [None], {},
    {"": None}, [1, 2, 3, 4], [1e9] * 6, [-1, -1, 0, 0], [[0.1] * 10_000],
)  # fmt: skip


def damaged_bytes(random, content):
    """bytes with 1 to 3 accidents: cut short, bytes flipped, lost, doubled, zeroed, or a length field that lies."""
    content = bytearray(content)
    for _ in range(random.randint(1, 3)):
        start = random.randrange(len(content) + 1)
        stretch = slice(start, start + random.choice((1, 2, 4, 16, 256)))
        how = random.randrange(6)
        if how == 0:
            del content[start:]
        elif how == 1:
            content[stretch] = random.randbytes(len(content[stretch]))
        elif how == 2:
            del content[stretch]
        elif how == 3:
            content[start:start] = content[stretch]
        elif how == 4:
            content[stretch] = bytes(len(content[stretch]))
        else:
            content[start : start + 4] = random.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
    return bytes(content)


def damaged_tree(random, tree, odd=ODD):
    """A copy of dicts, lists and plain values in which 1 to 3 places are replaced, lost, doubled or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(random.randint(1, 3)):
        holder, key = _place(random, tree)
        if holder is None:
            return copy.deepcopy(random.choice(odd))
        how = random.randrange(4)
        if how == 0 and isinstance(holder, dict):
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.append(holder[key])
        elif how == 2:
            other, place = _place(random, tree)
            holder[key] = copy.deepcopy(other[place] if other else random.choice(odd))
        else:
            holder[key] = copy.deepcopy(random.choice(odd))
    return tree


def _place(random, tree):
    """(holder, key) of a value at a random depth; (None, None) where there is nothing to change."""
    holder, key, value = None, None, tree
    while isinstance(value, dict | list) and value:
        holder, key = value, random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = holder[key]
        if random.random() < 0.3:
            break
    return holder, key
