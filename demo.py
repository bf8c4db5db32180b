"""Find the objects in pictures, and say who they are.

Boxes, classes and masks of one picture, several, a folder, a pattern:
    python demo.py photo.jpg
    python demo.py photos/ "more/**/*.jpg" --segment runs/MASKS/best.pth \\
        --score 0.7 --classes suitcase backpack
A gallery out of pictures of one object each, and who of it is in a scene:
    python demo.py --build-gallery bags/ --gallery bags.gallery
    python demo.py scene.jpg --gallery bags.gallery
    python demo.py --build-gallery new/ --gallery bags.gallery --add
    python demo.py --gallery all.gallery --merge bags.gallery more.gallery
Who is in it; and identities, pictures or folders out of it:
    python demo.py --gallery bags.gallery
    python demo.py --gallery bags.gallery --remove 0010 bags/blue/2.jpg
Do two pictures show the same object?
    python demo.py a.jpg b.jpg --compare

--segment is the network that finds objects: a checkpoint of train_mask_rcnn.py,
torchvision's COCO file of Mask R-CNN, or the word coco, which fetches that
file. Without it the one that the gallery was built with is taken, or the newest
best.pth of a Mask R-CNN under runs/ (last.pth of a run that was not evaluated),
and where there is none, the published COCO weights. --reid is the one that
recognises them, a checkpoint of train_reid.py, or else the one that the gallery
was built with, or the newest under runs/.

In a gallery's folder each sub-folder is an identity; pictures beside them are
of the identity that an MVB name says (0010_g_1.jpg), or that their own name is.
Objects are cut out along their masks, unless --no-masks is given. What joins a
gallery is taken as its pictures were. A photograph of one object is searched
for as a whole with --no-masks, and where the gallery's pictures are whole,
unless --segment, --score or --classes asks for the objects in it.

For each picture there is a folder <--output>/<its name> with
    instances.json: `picture`, its path as it was given, `width`, `height`;
        `segment`, the network that found the objects, `min_score`, as --score
        says; of each instance its number, class, score, box [x1, y1, x2, y2] in
        pixels, and the mask as a run-length code that pycocotools.mask.decode
        reads; both are of the upright picture: turned as its EXIF orientation
        says, as viewers show it. An object that was found as two classes is
        there once, the others stand in `also`. With a gallery also `gallery`,
        `reid`, `metric`, `threshold`, and of each instance `identity`, null
        where it is unknown, and `matches`, the nearest identities with their
        distances; of those of one identity that lie on each other, the nearest.
        `false_accept_rate`, `true_accept_rate`: the shares of pairs of two
        objects and of one that may pass the threshold, and did, when the ReID
        network was validated on `identities`; `false_accept_interval`, what may
        pass of others, at 95 % confidence; null where the threshold is not its
        own
    sheet.jpg: six panels: the picture; boxes with class and score; masks; masks
        over the picture; masks and classes; all together. Each is a file, too:
        original, boxes, masks, overlay, classes, all. With a gallery: the
        scene, its instances numbered, and beside each number its best matches;
        identities.jpg is the scene alone
and index.html shows them all, those that are done where the run is stopped. Two
pictures that are compared leave comparison.jpg and comparison.json: `same`,
true or false, null without a threshold; `answer`, that in words; `distance`;
`similarity`, their cosine, null where the network has another metric;
`cut_out`, whether they were cut out along masks; and the networks, threshold
and rates as above. A folder that exists is never overwritten, the next free
number is added.
"""

import glob
import os
import sys
from contextlib import nullcontext

from core.engine import options

LEAST_SCORE, LEAST_OF_GALLERY = 0.5, 0.35


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("pictures", nargs="*", help="files, folders, patterns such as 'photos/*.jpg'")
    group = parser.add_argument_group("what to do, instead of finding the objects alone")
    group.add_argument("--gallery", metavar="FILE", help="say who they are, by this gallery; alone: who is in it")
    group.add_argument("--compare", action="store_true", help="do two pictures show the same object?")
    group.add_argument("--build-gallery", metavar="FOLDER", help="make --gallery out of the pictures in a folder")
    group.add_argument("--add", action="store_true", help="with --build-gallery: add them to a gallery that exists")
    group.add_argument("--remove", nargs="+", metavar="NAME", help="take identities or pictures out of --gallery")
    group.add_argument("--merge", nargs="+", metavar="FILE", help="make --gallery out of these")
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--segment",
        "--weights",
        metavar="PATH",
        help="a checkpoint of train_mask_rcnn.py, torchvision's file, or coco: the published one",
    )
    group.add_argument("--reid", metavar="PATH", help="a checkpoint of train_reid.py, or a file of --backbone")
    options.add_published_options(parser)
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--score",
        type=options.fraction,
        help=f"least score of what is shown (default: {LEAST_SCORE}, with a gallery {LEAST_OF_GALLERY}); "
        "below the network's own --min-score (0.05 unless trained otherwise) it changes nothing",
    )
    group.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="look for these only (default: all, or what the gallery is of)",
    )
    group.add_argument(
        "--threshold",
        type=options.non_negative_float,
        metavar="DISTANCE",
        help="two are the same up to this distance (default: that of the ReID checkpoint)",
    )
    group.add_argument(
        "--matches",
        type=options.positive_int,
        default=5,
        help="identities listed for an instance; the sheet shows 10 at most",
    )
    group.add_argument(
        "--no-masks", action="store_true", help="gallery and comparison: whole pictures, nothing cut out"
    )
    group.add_argument("--output", default="runs/demo", metavar="FOLDER", help="folder for the results")
    options.add_size_limit(group)
    options.add_device_options(parser, timeout=False)
    return parser


if __name__ == "__main__":
    options.answer_help(get_parser())  # before torch is imported, which takes seconds

from tqdm import tqdm

from core.data.images import (
    IMAGE_SUFFIXES,
    bits_in_use,
    folder_entries,
    list_files,
    list_images,
    read_image,
    say_unread,
)
from core.engine import distributed
from core.engine.checkpoint import open_output
from core.engine.log import progress_is_shown
from core.errors import InputError
from core.files import distinct_names, printable
from recognition import gallery, gallery_pictures, matching
from recognition.networks import (
    TRAIN_MASKS,
    TRAIN_REID,
    NothingTrained,
    find_instances,
    load_detector,
    load_encoder,
    whole_picture,
)
from recognition.page import index_page
from recognition.results import titles_of, write_comparison, write_identities, write_instances

# The ways of use, each known by its option, and what else it takes. What has no effect is refused, not ignored.
ENCODER = ("reid", "backbone", "model")
USES = {
    "compare": ("pictures", "segment", *ENCODER, "threshold", "classes", "no_masks", "output"),
    "build_gallery": ("gallery", "add", "segment", *ENCODER, "classes", "no_masks"),
    "remove": ("gallery",),
    "merge": ("gallery",),
    "gallery": ("pictures", "segment", *ENCODER, "threshold", "matches", "score", "classes", "no_masks", "output"),
    "pictures": ("segment", "score", "classes", "output"),
}
OF_OBJECTS = ("segment", "score", "classes")  # which of them are looked for in a picture, and by whom

MANY_STRANGERS = 0.1  # of those that nobody knows: above, a person is told that so many pass the threshold


def choose_use(args):
    """Which of `USES` is asked for. Raises InputError for options that don't belong together, or are missing."""
    parser = get_parser()
    given = [name for name in parser.given(args) if name not in ("device", "amp", "max_megapixels")]
    use = next((name for name in USES if name in given), "pictures")
    strange = [name for name in given if name != use and name not in USES[use]]
    if strange:
        together = "pictures alone" if use == "pictures" else parser.as_typed([use])
        homes = [home for home, others in USES.items() if home != "pictures" and set(strange) <= set(others)]
        way = f"it goes with {parser.as_typed(homes)}" if homes else "leave it out"
        raise InputError(f"{parser.as_typed(strange)}: not an option together with {together}; {way}")
    without = [name for name in given if name in OF_OBJECTS] if args.no_masks else []
    if without:
        raise InputError(
            f"--no-masks takes pictures whole, so nothing is looked for: leave out {parser.as_typed(without)}"
        )
    if "gallery" in USES[use] and not args.gallery:
        raise InputError(f"{parser.as_typed([use])}: give the file with --gallery FILE")
    if use == "compare" and len(args.pictures) != 2:
        raise InputError(f"--compare needs two pictures, {len(args.pictures)} given")
    if use in ("gallery", "pictures") and not args.pictures and given != ["gallery"]:  # alone it is listed
        raise InputError("no pictures given: name files, folders or patterns such as 'photos/*.jpg'")
    return use


def main(args):
    use = choose_use(args)
    device = distributed.setup(args.device)
    if use == "compare":
        compare(args, device)
    elif use == "build_gallery":
        build_gallery(args, device)
    elif use in ("remove", "merge"):
        change_gallery(args)
    elif args.pictures:
        show(args, device)
    else:
        list_gallery(args)


def say(text):
    """A line for the person; it may name files of any name."""
    print(printable(text))


# Pictures -> instances -> who they are


def show(args, device):
    """Find the objects in every picture and, with a gallery, say who they are."""
    paths = list_pictures(args.pictures)
    least = LEAST_OF_GALLERY if args.gallery else LEAST_SCORE
    score = least if args.score is None else args.score
    with (
        open_output(args.output) as output,
        gallery.open_gallery(args.gallery) if args.gallery else nullcontext() as known,
    ):
        identifier = load_identifier(args, device, known) if args.gallery else None
        detector = scene_detector(args, device, known)
        how = f"{detector.message}; score at least {score}" if detector else "pictures are taken whole"
        cards, skipped = [], []
        bits = bits_in_use(paths, say, identifier.encoder.bits if identifier else detector.bits)
        places = list(zip(paths, titles_of(paths), distinct_names(paths, taken={"index.html"}), strict=True))
        bar = tqdm(places, disable=not progress_is_shown(), unit="picture")
        try:
            for path, title, folder in bar:
                try:
                    picture = read_image(path, bits)
                except InputError as error:
                    skipped.append(str(error))
                    bar.write(f"skipped: {printable(error)}", file=sys.stderr)
                    continue
                about = {"picture": str(path), "width": picture.width, "height": picture.height}
                about |= {"segment": detector and detector.path, "min_score": score if detector else None}
                cards.append(show_picture(output / folder, title, picture, detector, identifier, about))
                bar.write(f"{printable(path)}: {printable(cards[-1].caption)}", file=sys.stdout)
        finally:  # also of a run that is interrupted, what is done is shown
            bar.close()
            write_page(output, f"{how}; {identifier}" if identifier else how, cards, skipped, len(paths))
    stop_for(skipped, len(paths))


def show_picture(folder, title, picture, detector, identifier, about):
    """Find the objects in one picture and, with a `matching.Identifier`, say who they are; returns its card.

    Without a detector the picture is one object.
    """
    found, most = find_instances(detector, picture, about["min_score"]) if detector else (whole_picture(picture), None)
    note = f"; {most} is as many as the network returns, there may be more" if most else ""
    found = matching.one_per_object(found)
    if identifier:
        named = matching.identify_instances(identifier, picture, found)
        return write_identities(folder, title, picture, *named, identifier, about, note)
    classes = [category[1] for category in detector.categories if category]
    return write_instances(folder, title, picture, found, classes, about, note)


def scene_detector(args, device, known):
    """The network that finds objects, said; None where pictures are searched for as a whole in the gallery `known`."""
    if args.no_masks or (known is not None and not known.masks and not asks_for_objects(args)):
        if known.masks:
            say("pictures are taken whole, with their background, and those of the gallery were cut out along masks")
        else:
            say("pictures are taken whole, as those of the gallery; --segment NETWORK finds several objects in each")
        return None
    try:
        path = args.segment or network_of(known, "segment")
        detector = load_detector(path, device, args.amp, classes_of(args, known))
    except NothingTrained as error:
        way = "; --no-masks takes a picture as a whole" if known is not None and not asks_for_objects(args) else ""
        raise NothingTrained(f"{error}{way}") from error
    say(detector.message)
    if not detector.is_own and not args.segment:
        say(f"to train for your own objects: {TRAIN_MASKS} finds them, {TRAIN_REID} recognises them")
    return detector


def asks_for_objects(args):
    """Whether a person wants objects looked for in pictures, and says how."""
    return any(getattr(args, name) is not None for name in OF_OBJECTS)


def write_page(folder, about, cards, skipped, total):
    """index.html of the pictures that are done, of `total`; none where there are none."""
    if cards:
        title = f"{len(cards)} picture{'s' * (len(cards) != 1)}"
        if len(cards) + len(skipped) < total:
            title = f"{len(cards)} of {total} pictures"
        index_page(folder / "index.html", title, about, cards, skipped)
        say(f"written to {folder}; {folder / 'index.html'} shows it")


def list_pictures(patterns):
    """Paths of the pictures that files, folders and patterns name, each once, in that order.

    Raises InputError for one that names none, and for a folder that can't be read. A file that is named itself needs no
    suffix of a picture.
    """
    found = {}
    for pattern in patterns:
        if os.path.isdir(pattern):
            say_unread(list_files(pattern), pattern, say)
            paths = list_images(pattern)
            if not paths:
                raise InputError(
                    f"{pattern}: no pictures in this folder; for those in its folders give '{glob.escape(pattern)}/**'"
                )
        elif os.path.exists(pattern):
            paths = [pattern]
        else:
            looked_in = pattern if pattern.endswith("**") else os.path.dirname(pattern) or os.curdir
            for folder in glob.glob(os.path.join(looked_in, ""), recursive=True):
                folder_entries(folder)  # the trap: glob leaves out what can't be read without a word
            matches = sorted(glob.glob(pattern, recursive=True))
            say_unread(matches, pattern, say)
            paths = [path for path in matches if path.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(path)]
            if not paths:
                raise InputError(f"{pattern}: no such picture; check the path")
        for path in paths:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def load_identifier(args, device, known):
    """`matching.Identifier`: the open gallery `known`, the network that it was built with, what is the same."""
    if len(known) == 0:
        raise InputError(f"{args.gallery} is empty: nobody is known; fill it with --build-gallery FOLDER --add")
    encoder = encoder_of(args, device, known)
    known.require(encoder.fingerprint, encoder.path)
    threshold = matching.settle_threshold(encoder, args.threshold)
    identifier = matching.Identifier(known, encoder, threshold, args.matches)
    say(identifier)
    if threshold is None:
        say("this checkpoint carries no threshold: everyone is unknown; give --threshold")
    strangers, may_be_more, identities = identifier.strangers_accepted() or (0, False, 0)
    if strangers > MANY_STRANGERS:
        share = f"{'at least' if may_be_more else 'about'} {100 * strangers:.0f} %"
        say(
            f"among so many, {share} of strangers find somebody near enough, as measured on {identities} identities; "
            f"`python evaluate.py {encoder.path} --false-accept-rate RATE` says a smaller --threshold"
        )
    return identifier


def network_of(known, kind):
    """The checkpoint ("reid" or "segment") that a gallery was built with, if it is still there, or None."""
    path = None if known is None else known.info.get(kind)
    return path if path and os.path.isfile(path) else None


def encoder_of(args, device, known=None):
    """The network that tells them apart: the one that a person names, else the one that a gallery was built with."""
    if args.reid or known is None:
        return load_encoder(args.reid, device, args.amp, (args.backbone, args.model))
    published = known.info.get("published", (args.backbone, args.model))
    return load_encoder(network_of(known, "reid"), device, args.amp, published)


def classes_of(args, known):
    """What to look for: what a person says, else what the gallery's pictures were searched for; None: everything."""
    return args.classes or (None if known is None else known.info.get("classes"))


def stop_for(skipped, total, what_now=""):
    """Raises InputError where pictures were skipped, when all else is done."""
    if skipped:
        raise InputError(f"{len(skipped)} of {total} pictures were skipped{what_now}, the first is {skipped[0]}")


# A gallery


def build_gallery(args, device):
    """A gallery out of the pictures in a folder, or more of them for one that exists; each shows one object."""
    paths = gallery_pictures.pictures_of_gallery(args.build_gallery, say)
    if not args.add and os.path.lexists(args.gallery):
        what = "a folder:" if os.path.isdir(args.gallery) else "there already: --add adds to it, or"
        raise InputError(f"{args.gallery} is {what} give another name")
    with gallery.open_gallery(args.gallery) if args.add else nullcontext() as known:
        encoder = encoder_of(args, device, known)
        if args.add:
            asked = args.no_masks or asks_for_objects(args)  # else they are taken as those that are there
            known.require(encoder.fingerprint, encoder.path, masks=not args.no_masks if asked else None)
        say(encoder.message)
        whole = args.no_masks or (args.add and not known.masks)
        detector = None if whole else subject_detector(args, device, known)
        if whole and args.add:
            say("pictures are taken whole, as those of the gallery")
        names = gallery_pictures.name_identities(paths, args.build_gallery, known.names if args.add else ())
        before = gallery_pictures.pictures_of_each(known) if args.add else {}
        renamed = gallery_pictures.renamed(known, paths, names) if args.add else []
    bits = bits_in_use(paths, say, encoder.bits)
    subjects = gallery_pictures.Subjects(paths, names, encoder, detector, bits)
    if args.add:
        _, replaced = gallery.add_to_gallery(args.gallery, subjects, fingerprint=encoder.fingerprint)
        say(f"replaced, since they were in it before: {replaced} of {len(paths)} pictures")
        with gallery.open_gallery(args.gallery) as written:
            more = gallery_pictures.grown(before, gallery_pictures.pictures_of_each(written))
        say_names(more, "was in it before and has more pictures now", "were in it before and have more pictures now")
    else:
        info = gallery_pictures.gallery_info(encoder, detector, args.classes)
        gallery.build_gallery(args.gallery, subjects, fingerprint=encoder.fingerprint, metric=encoder.metric, info=info)
    if renamed:
        path, before, now = renamed[0]
        say(f"of another identity than before: {len(renamed)} of these, the first {path}, now {now}, was {before}")
    if subjects.whole:
        say(
            f"nothing found in {len(subjects.whole)} of {len(paths)} pictures, which are taken whole, with their "
            f"background; the first is {subjects.whole[0]}"
        )
    say_written(args.gallery)
    stop_for(subjects.skipped, len(paths), " (when they are mended, --add adds them)")


def say_written(path):
    with gallery.open_gallery(path) as written:
        twins = written.twins()
        if twins:
            one, other = (f"{written.source(row)} (of {written.identity_of(row)})" for row in twins[0])
            count = f"{len(twins)} picture{'s' * (len(twins) != 1)}"
            say(f"in it once more under another path: {count}, the first {one} as {other}; --remove PATH takes one out")
        say(f"written to {path}: {matching.size_of(written)}")


def subject_detector(args, device, known=None):
    """The network that cuts objects out; None, which is said, where there is none and no gallery `known` needs one."""
    own = network_of(known, "segment")
    try:
        detector = load_detector(args.segment or own, device, args.amp, classes_of(args, known))
    except NothingTrained as error:
        if known is not None:
            raise
        say(f"pictures are taken whole, not cut out along masks: {error}")
        return None
    say(detector.message)
    if own and os.path.realpath(own) != os.path.realpath(detector.path):
        say(f"the pictures that are in the gallery were cut out by another network: {own}")
    return detector


def list_gallery(args):
    """Who is in a gallery, and how it was made."""
    with gallery.open_gallery(args.gallery) as known:
        counts = gallery_pictures.pictures_of_each(known)
        say(f"gallery: {matching.size_of(known)}")
        for what, value in known.info.items():
            if value is not None:
                say(f"{what}: {value}")
        for name, count in sorted(counts.items()):
            say(f"{count:>6}  {name}")


def change_gallery(args):
    """Take identities or pictures out of a gallery, or make one out of several."""
    if args.remove:
        count = gallery.remove_from_gallery(args.gallery, args.remove)
        say(f"removed: {count} picture{'s' * (count != 1)}")
    else:
        _, shared = gallery.merge_galleries(args.gallery, args.merge)
        say_names(shared, "is in more than one of them", "are in more than one of them")
    say_written(args.gallery)


def say_names(names, one, many):
    """2 identities <many>: blue, red. Of none, nothing."""
    if names:
        number = f"1 identity {one}" if len(names) == 1 else f"{len(names)} identities {many}"
        say(f"{number}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}")


# Two pictures


def compare(args, device):
    """Do two pictures show the same object? Says the distance and, where there is a threshold, yes or no."""
    for path in args.pictures:
        read_image(path)  # a bad one is told before networks are read
    with open_output(args.output) as output:
        encoder = encoder_of(args, device)
        say(encoder.message)
        bits = bits_in_use(args.pictures, say, encoder.bits)
        pictures = [read_image(path, bits) for path in args.pictures]
        detector = None if args.no_masks else subject_detector(args, device)
        verdict, cuts = matching.compare(pictures, encoder, detector, args.threshold)
        if detector and None in cuts:
            say("the object was not found in both pictures: both are taken whole")
        write_comparison(output, args.pictures, pictures, cuts, verdict, encoder, detector)
    say(f"{verdict.answer}: {verdict.reason}")
    say(f"written to {output / 'comparison.jpg'}")


if __name__ == "__main__":
    distributed.run_script(lambda argv: main(options.parse(get_parser(), argv=argv)), sys.argv[1:])
