"""The run folder of a ReID training, from the first line of its log to its last picture."""

import time

from core.engine import distributed, reid, reid_pictures
from core.engine.run import Run
from core.retrieval.ranking import METRIC_NAMES


class ReIDRun(Run):
    """Opens or resumes the run folder; evaluates, logs and saves each epoch; draws at the end.

        run = ReIDRun(args, say, network, network_options, criterion, step, data, loaders, device)
        for epoch in run.epochs():
            run.end_epoch(train_one_epoch(...))
        run.close()

    A new run is evaluated before its first epoch, too: what it begins with may stay the best.

    Args:
        network, criterion, step: bare network, loss with its own parameters, `Step`; a resumed run gets their state.
        network_options: what `build_reid_model` made the network of.
        data: `ReIDData`; without query and gallery the run trains without evaluation.
        loaders: (training, query, gallery).
    """

    kind, score = "reid", "mAP"

    def __init__(self, args, say, network, network_options, criterion, step, data, loaders, device):
        self.network, self.network_options, self.criterion = network, network_options, criterion
        self.data, self.device, self.evaluation = data, device, None
        self.train_loader, *self.eval_loaders = loaders
        super().__init__(args, say, step, self._metrics())
        if not self.resumed:
            if distributed.is_main():
                reid_pictures.draw_augmentations(self.folder / "augmentation.png", self.train_loader.dataset)
            self.end_epoch({"epoch": 0})

    def _metrics(self):
        """Columns of an evaluation, as `RunLog` wants them."""
        return METRIC_NAMES

    def _resume(self, state, path):
        reid.resume(state, path, self.network, self.network_options, self.criterion, self.step, self.data)

    def _evaluate(self):
        """Metrics of the network that counts (the averaged one where there is one); {} where nothing can be asked."""
        self.evaluation = reid.evaluate(self.step.evaluated[0], self.eval_loaders, self.data, self.args, self.device)
        return self.evaluation.metrics if self.evaluation else {}

    def _state(self, best, evaluated):
        measured = self.evaluation if evaluated else None
        threshold = measured and reid.threshold(measured.query, measured.gallery, self.data, self.args)
        network = (self.network, self.network_options, self.criterion)
        return reid.checkpoint_state(*network, self.step, best, self.args, self.data, threshold)

    def close(self):
        """Draw whom the network finds and, with a mask decoder, where it sees the object; say what to do next."""
        if self.evaluation is None:  # a finished run that was resumed
            self._evaluate()
        network = self.step.evaluated[0]
        if self.evaluation and distributed.is_main():
            embeddings = (self.evaluation.query, self.evaluation.gallery)
            reid_pictures.draw_rank_list(self.folder / "rank_list.png", *embeddings, self.data, self.args.distance)
            if network.mask_decoder is not None:
                images = self.eval_loaders[0].dataset
                reid_pictures.draw_masks(self.folder / "masks.png", network, images, self.device)
        self.log.say(f"done in {(time.perf_counter() - self.start) / 60:.1f} minutes, see {self.folder}")
        if (self.folder / "best.pth").exists():
            best = self.folder / "best.pth"
            self.log.say(f"best mAP {100 * self.best:.1f}; next: python evaluate.py {best} --rerank")
        self.log.close()
