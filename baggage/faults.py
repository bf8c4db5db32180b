"""What can be wrong with a baggage set: the kinds of faults, the worst first, and one of them."""

from typing import NamedTuple

from core.files import printable

FAULTS = {  # kind -> what it means; the worst first
    "identity_in_train_and_test": "leakage: an identity that is trained on is also searched for",
    "copies_across_splits": "leakage: the same picture in two of train, gallery and probe",
    "copies": "the same picture more than once, but not in two splits",
    "missing_part": "a folder, a list or a side that the layout has and these data lack",
    "metadata": "an entry, or a whole list, with something missing or of the wrong type",
    "mixed_ids": "ids in two forms: number and text, other zeros, blanks; training reads 1 and '0001 ' as one bag",
    "name_disagrees": "a file name that says another identity or side than its entry",
    "listed_twice": "a picture that has more than one entry",
    "metadata_without_picture": "an entry whose picture is not on the disk",
    "picture_without_metadata": "a picture that no entry (or, converted, no name) describes",
    "unreadable": "a file that can't be read as a picture",
    "wrong_bit_depth": "a picture with 16 bits a value that fills far fewer of them than others of its set",
    "single_coloured": "a picture of one colour",
    "tiny": "a picture too small to show anything",
    "wrong_size": "an entry with another size than its picture",
    "box_outside": "a box that reaches out of its picture",
    "mask_of_another_size": "a mask made for a picture of another size",
    "mask_damaged": "a mask that is empty, or whose run lengths don't cover the picture",
    "one_source": "an identity that was photographed on one side of security alone",
    "one_split": "a test identity in the gallery alone (nothing asks for it) or the probe alone (nothing to be found)",
}


def in_words(kind):
    """A kind of FAULTS for people: identity in train and test."""
    return kind.replace("_", " ")


class Fault(NamedTuple):
    """kind: one of FAULTS. where: a file, "list, entry 3 (name)" or "identity 0010", from the data's own folder on.

    paths: the pictures at fault that are on the disk, from that folder on.
    """

    kind: str
    where: str
    message: str
    paths: tuple = ()


def make_fault(kind, where, message, paths=()):
    """Every Fault is made here: names of the data may hold bytes that are no text, and no report could be written."""
    return Fault(kind, printable(where), printable(message), paths)
