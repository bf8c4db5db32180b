"""The run folder of a ReID training, from the first line of its log to its last picture."""

import time

from core.engine import distributed, reid, reid_pictures
from core.engine.checkpoint import changed_options, load_checkpoint, open_run, save_run
from core.engine.log import RunLog
from core.retrieval.ranking import METRIC_NAMES


class ReIDRun:
    """Opens or resumes the run folder; evaluates, logs and saves each epoch; draws at the end.

        run = ReIDRun(args, say, network, network_options, criterion, step, data, loaders, device)
        for epoch in run.epochs():
            run.end_epoch(train_one_epoch(...))
        run.close()

    Args:
        say: `Announcer` of what was printed so far; it knows when the run began.
        network, criterion, step: bare network, loss with its own parameters, `Step`; a resumed run gets their state.
        network_options: what `build_reid_model` made the network of.
        data: `ReIDData`; without query and gallery the run trains without evaluation.
        loaders: (training, query, gallery).

    Attributes:
        folder: the run folder. log: `RunLog`. best: the highest mAP so far.
    """

    def __init__(self, args, say, network, network_options, criterion, step, data, loaders, device):
        self.args, self.network, self.network_options, self.criterion = args, network, network_options, criterion
        self.step, self.data, self.device, self.start = step, data, device, say.start
        self.train_loader, *self.eval_loaders = loaders
        self.best, self.evaluation = -1.0, None
        self.folder, resumed = open_run(args.output, args.name, args.resume)
        if resumed:
            state = load_checkpoint(resumed, "reid")
            self._resume(state, resumed)
            self.best = state["best"]
            say(f"continuing from {resumed} after epoch {step.epoch}{changed_options(state['args'], args)}")
        elif args.resume:
            say(f"--resume: no checkpoint of {args.name} under {args.output}, starting afresh")
        say(f"run folder: {self.folder}")
        self.log = RunLog(self.folder, args, self._metrics(), say.said, resume_epoch=step.epoch if resumed else None)
        if not resumed:
            if distributed.is_main():
                reid_pictures.draw_augmentations(self.folder / "augmentation.png", self.train_loader.dataset)
            self.log.epoch({"epoch": 0, **self._evaluate()})

    def epochs(self):
        """The numbers of the epochs that are still to be trained."""
        return range(self.step.epoch + 1, self.args.epochs + 1)

    def _metrics(self):
        """Columns of an evaluation, as `RunLog` wants them."""
        return METRIC_NAMES

    def _resume(self, state, path):
        reid.resume(state, path, self.network, self.network_options, self.criterion, self.step, self.data)

    def _evaluate(self):
        """Metrics of the network that counts (the averaged one where there is one); {} where nothing can be asked."""
        self.evaluation = reid.evaluate(self.step.evaluated[0], self.eval_loaders, self.data, self.args, self.device)
        return self.evaluation.metrics if self.evaluation else {}

    def end_epoch(self, row):
        """Evaluate where `--eval-every` says so, add the row to the log, save last.pth and, if it is, best.pth."""
        args, evaluation = self.args, None
        if self.step.epoch % args.eval_every == 0 or self.step.epoch == args.epochs:
            row |= self._evaluate()
            evaluation = self.evaluation
        self.log.epoch(row)
        improved = row.get("mAP", -1.0) > self.best
        self.best = row["mAP"] if improved else self.best
        threshold = evaluation and reid.threshold(evaluation.query, evaluation.gallery, self.data, args)
        if distributed.is_main():
            network = (self.network, self.network_options, self.criterion)
            save_run(
                self.folder, reid.checkpoint_state(*network, self.step, self.best, args, self.data, threshold), improved
            )

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
