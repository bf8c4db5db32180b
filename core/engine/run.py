"""The run folder of a training: opened or resumed, and at the end of each epoch evaluated, logged and saved."""

from core.engine import distributed
from core.engine.checkpoint import changed_options, load_checkpoint, open_run, save_run
from core.engine.log import RunLog, check_loggers


def open_or_resume(args, kind):
    """(run folder, path and content of the checkpoint that is resumed, or None); kind: of the run, see `open_run`."""
    folder, path = open_run(args.output, args.name, args.resume)
    return folder, path, path and load_checkpoint(path, kind)


class Run:
    """What all trainings have in common. A training adds `_resume`, `_evaluate` and `_state`, and sets `kind`, of its
    checkpoints, and `score`, the metric whose highest value is the best.

    Args:
        say: `Announcer` of what was printed so far; it knows when the run began.
        step: `Step` that counts the epochs.
        metrics: columns of an evaluation, as `RunLog` wants them.
        without_effect: options that a resumed run may have otherwise, without a word.
        opened: what `open_or_resume` gave, where it is known already.

    Attributes:
        folder: the run folder. log: `RunLog`. best: the highest score so far. resumed: whether the run goes on.
    """

    kind = score = None

    def __init__(self, args, say, step, metrics, without_effect=(), opened=None):
        self.args, self.step, self.start, self.best = args, step, say.start, -1.0
        check_loggers(args)
        self.folder, path, state = opened or open_or_resume(args, self.kind)
        self.resumed, unfinished = state is not None, None
        if self.resumed:
            self._resume(state, path)
            self.best, unfinished = state.get("best", self.best), state.get("unfinished")
            changed = changed_options(state["args"], args, without_effect)
            say(f"continuing from {path} after epoch {step.epoch}{', to be evaluated' * bool(unfinished)}{changed}")
        elif args.resume:
            say(f"--resume: no checkpoint of {args.name} under {args.output}, starting afresh")
        say(f"run folder: {self.folder}")
        logged = step.epoch - bool(unfinished) if self.resumed else None
        self.log = RunLog(self.folder, args, metrics, say.said, resume_epoch=logged)
        if unfinished:
            self.end_epoch(unfinished)

    def epochs(self):
        """The numbers of the epochs that are still to be trained."""
        return range(self.step.epoch + 1, self.args.epochs + 1)

    def end_epoch(self, row):
        """Evaluate where `--eval-every` says so, add the row to the log, save last.pth and, if it is, best.pth.

        Where that is interrupted (Ctrl-C, SIGTERM), what was trained is saved: a resumed run only evaluates it.
        """
        trained, epoch, args = dict(row), self.step.epoch, self.args
        try:
            evaluated = epoch % args.eval_every == 0 or epoch == args.epochs
            row |= self._evaluate() if evaluated else {}
            self.log.epoch(row)
            best = max(row.get(self.score, -1.0), self.best)
            state = self._state(best, evaluated)
            if distributed.is_main():
                save_run(self.folder, state, improved=best > self.best)
            self.best = best
        except KeyboardInterrupt:
            if distributed.is_main():
                save_run(self.folder, {**self._state(self.best, False), "unfinished": trained}, improved=False)
            raise

    def _resume(self, state, path):
        """Continue from a checkpoint."""
        raise NotImplementedError

    def _evaluate(self):
        """The metrics of the network as it is now, a dict; {} where nothing can be measured."""
        raise NotImplementedError

    def _state(self, best, evaluated):
        """The content of a checkpoint; evaluated: whether the last evaluation was of these weights. Every rank calls it
        where they were; where they weren't, it must not wait for others."""
        raise NotImplementedError
