"""The run folder of a training: opened or resumed, and at the end of each epoch evaluated, logged and saved."""

from contextlib import suppress

from core.engine import distributed
from core.engine.checkpoint import changed_options, load_checkpoint, open_run, save_run
from core.engine.log import RunLog
from core.errors import InputError, as_written


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
        saved: the last epoch that is finished, with its evaluation, and in last.pth.
    """

    kind = score = None

    def __init__(self, args, say, step, metrics, without_effect=(), opened=None):
        self.args, self.step, self.start, self.best = args, step, say.start, -1.0
        self.folder, path, state = opened or open_or_resume(args, self.kind)
        self.resumed, unfinished = state is not None, None
        if self.resumed:
            with as_written(path, "resume another checkpoint, or begin a new run"):
                self._resume(state, path)
                self.best, unfinished = state.get("best", self.best), state.get("unfinished")
                changed = changed_options(state["args"], args, without_effect)
            say(f"continuing from {path} after epoch {step.epoch}{', to be evaluated' * bool(unfinished)}{changed}")
        elif args.resume:
            say(f"--resume: no checkpoint of {args.name} under {args.output}, starting afresh")
        say(f"run folder: {self.folder}")
        self.saved = step.epoch - bool(unfinished)
        logged = self.saved if self.resumed else None
        self.log = RunLog(self.folder, args, metrics, say.said, resume_epoch=logged)
        distributed.at_termination(self._how_to_go_on)
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
            score = row.get(self.score, -1.0)
            best = score if score > self.best else self.best  # it may be nan
            state = self._state(best, evaluated)
            if distributed.is_main():
                save_run(self.folder, state, improved=best > self.best)
            self.best, self.saved = best, epoch
        except KeyboardInterrupt:
            if distributed.is_main():
                save_run(self.folder, {**self._state(self.best, False), "unfinished": trained}, improved=False)
            raise

    def _how_to_go_on(self):
        """What SIGTERM makes of the run, a line for people that train.log keeps, too."""
        if self.step.epoch == 0:
            words = "before an epoch was finished: --resume begins anew"
        elif self.saved < self.step.epoch:
            words = f"with epoch {self.step.epoch} trained and saved: --resume evaluates it and goes on"
        else:
            words = f"with epoch {self.saved} finished and saved: --resume goes on behind it"
        with suppress(InputError):  # the disk is full
            self.log.keep(f"stopped by SIGTERM {words}")
        return f" {words} ({self.folder})"

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
