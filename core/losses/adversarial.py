"""What networks minimise that translate pictures against adversaries: CycleGAN and SPGAN."""

import torch

from core.losses.precision import at_least_float32


def gan_loss(prediction, real):
    """Least-squares GAN loss (Mao et al. 2017): mean squared distance to 1 where patches ought to be `real`, else to 0.

    Args:
        prediction: of a discriminator, (B, 1, h, w), without a sigmoid.
        real: bool. The discriminator minimises it with the truth, the generator with True for its own pictures.
    """
    return (at_least_float32(prediction) - float(real)).square().mean()


def l1_loss(first, second):
    """Mean absolute difference of two batches of pictures, for cycles and identities (Zhu et al. 2017)."""
    return (at_least_float32(first) - at_least_float32(second)).abs().mean()


def contrastive_loss(first, second, same, margin=2.0):
    """Contrastive loss (Hadsell et al. 2006) without its factor 1/2: d^2 for a pair that is the `same`, else
    max(0, margin - d)^2, the mean over the pairs; d is Euclidean.

    Args:
        first, second: embeddings (B, D), of unit length in SPGAN, whose margin of 2 is the farthest that two can be.
        same: 1 or 0, for all pairs or for each, (B,).
    """
    difference = at_least_float32(first) - at_least_float32(second)
    # As torch's pairwise_distance: 1e-6 gives the root a gradient where both are equal.
    distance = torch.linalg.vector_norm(difference + 1e-6, dim=1)  # (B,)
    return (same * distance.square() + (1 - same) * (margin - distance).clamp(min=0).square()).mean()


class ImagePool:
    """Pictures that a generator made some time ago: what a discriminator learns from besides the newest ones.

    So it can't forget what it has seen through already (Shrivastava et al. 2017, section 2.3; Zhu et al. 2017: 50).

    Args:
        size: pictures that are kept; 0: none.
    """

    def __init__(self, size=50):
        self.size, self.images = size, []

    def exchange(self, images, generator=None):
        """(B, 3, H, W) -> (B, 3, H, W), one after the other: while there is room a picture is kept, and returned. From
        then on it is returned in one of two cases; in the other it takes the place of an old one, which is returned.

        generator: torch.Generator of the CPU, for the coin and the place.
        """
        shown = []
        for image in images.detach():
            if len(self.images) < self.size:
                self.images.append(image.clone())  # not a view, which would keep its whole batch
            elif self.size and torch.rand((), generator=generator) < 0.5:
                place = int(torch.randint(self.size, (), generator=generator))
                # The pool of a checkpoint comes from the CPU.
                self.images[place], image = image.clone(), self.images[place].to(image.device)
            shown.append(image)
        return torch.stack(shown)

    def state_dict(self):
        return {"images": list(self.images)}

    def load_state_dict(self, state):
        self.images = list(state["images"])
