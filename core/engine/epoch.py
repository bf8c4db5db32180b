"""One pass over the training pictures: what is random in it, the bar that people watch, the line of the log."""

import os
import time

import torch
from tqdm import tqdm

from core.data.loading import batches
from core.data.randomness import derive_seed
from core.engine import distributed
from core.engine.log import progress_is_shown


def seed_everything(seed, deterministic=False):
    """Seed torch, and with `deterministic` ask for the same bits on a GPU, too.

    Operators without a deterministic kernel warn instead of stopping the run.
    """
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at the first CUDA call
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


class Epoch:
    """The batches of one epoch, and the means of their losses.

    progress = Epoch(loader, epoch, seed)
    for batch in progress:
        progress.add(step(losses, batch["path"]))
    row = progress.row()

    Dropout and the choice of RoIs become functions of (seed, epoch, rank), so a resumed run repeats them.

    loader: its batches are dicts with a list "path"; its batch sampler has `set_epoch`.
    """

    def __init__(self, loader, epoch, seed):
        self.loader, self.epoch, self.seed = loader, epoch, seed
        self.sums, self.images, self.seconds = {}, 0, 0.0
        self.bar = tqdm(total=len(loader), desc=f"epoch {epoch}", leave=False, disable=not progress_is_shown())

    def __iter__(self):
        torch.manual_seed(derive_seed("dropout", self.seed, self.epoch, distributed.rank()))
        self.loader.batch_sampler.set_epoch(self.epoch)
        start = time.perf_counter()
        with self.bar:
            for batch in batches(self.loader):
                yield batch
                self.images += len(batch["path"])
                self.bar.update()
        self.seconds = time.perf_counter() - start

    def add(self, means):
        """means: dict name -> float, the losses of one step. Of several steps in a batch each is added."""
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.bar.set_postfix(loss=f"{sum(means.values()):.3f}", refresh=False)

    def row(self):
        """dict: loss, each of its parts (means over the batches), and images_per_second over all ranks."""
        parts = {name: value / len(self.loader) for name, value in self.sums.items()}
        speed = self.images * distributed.world_size() / self.seconds
        return {"loss": sum(parts.values()), **parts, "images_per_second": speed}
