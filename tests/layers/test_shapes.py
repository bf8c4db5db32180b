import pytest
import torch

from core.layers.shapes import check_shapes


def shaped(*sizes):
    return torch.zeros(sizes)


def test_what_fits_passes():
    check_shapes(boxes=(shaped(3, 4), "N", 4), scores=(shaped(3), "N"), masks=(shaped(3, 1, 7, 7), "N", 1, "M", "M"))
    check_shapes(boxes=(shaped(0, 4), "N", 4), others=(shaped(5, 4), "M", 4))
    for boxes in (shaped(4), shaped(2, 3, 4), shaped(0, 4)):
        check_shapes(boxes=(boxes, ..., 4))
    check_shapes(number=(shaped(),))


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"boxes": (shaped(3, 5), "N", 4)}, r"boxes have shape (3, 5), expected (N, 4)"),
        ({"boxes": (shaped(4), "N", 4)}, r"boxes have shape (4,), expected (N, 4)"),
        ({"boxes": (shaped(3, 4), "N", 4), "scores": (shaped(5), "N")}, "scores have shape (5,), expected (3,)"),
        ({"a": (shaped(3, 4), "N", 4), "b": (shaped(3, 6), "M", 4)}, "b has shape (3, 6), expected (M, 4)"),
        ({"masks": (shaped(3, 1, 7, 8), "N", 1, "M", "M")}, "masks have shape (3, 1, 7, 8), expected (N, 1, M, M)"),
        ({"boxes": (shaped(2, 3, 5), ..., 4)}, "boxes have shape (2, 3, 5), expected (..., 4)"),
        ({"boxes": (shaped(), ..., 4)}, "boxes have shape (), expected (..., 4)"),
        ({"matched": (shaped(3, 1), "N")}, "matched has shape (3, 1), expected (N,)"),
    ],
)
def test_the_message_names_tensor_and_shape(tensors, message):
    with pytest.raises(ValueError) as caught:
        check_shapes(**tensors)
    assert str(caught.value) == message
