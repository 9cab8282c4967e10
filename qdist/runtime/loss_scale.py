"""The factor that keeps fp16 gradients representable (Micikevicius et al. 2018), the same for every engine."""

import math

from qdist.core.errors import JobError
from qdist.host.rundir import RunDir

_INITIAL, _SMALLEST, _LARGEST = 2.0**16, 2.0**-4, 2.0**24
_GROWTH_INTERVAL = 500


def before_training(what: str, loss: float, *, fp16: bool) -> JobError:
    """The error for a loss that is no number although no update was made yet."""
    fault = "weights, data or the range of fp16 are at fault" if fp16 else "weights or data are at fault"
    return JobError(
        f"{what} is {loss} before any training: {fault}, not the learning rate",
        try_="--set dtype=bfloat16" if fp16 else "download the model again, or other data",
    )


class LossScale:
    """Halves when gradients are not finite, doubles after GROWTH_INTERVAL finite steps; fixed at 1 unless fp16."""

    def __init__(self, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = _INITIAL if dynamic else 1.0
        self.finite_steps = 0

    def update(self, *, skipped: bool, step: int, loss: float, run: RunDir) -> None:
        """Take note of a step.

        loss: of the step, for the error. run: whose checkpoints it names.

        Raises JobError when gradients are not finite for a reason that no scale can mend.
        """
        if not skipped:
            self.finite_steps += 1
            if self.dynamic and self.finite_steps >= _GROWTH_INTERVAL and self.value < _LARGEST:
                self.value, self.finite_steps = self.value * 2, 0
            return
        if not self.dynamic:
            if step == 1 and not math.isfinite(loss):
                raise before_training("the loss of step 1", loss, fp16=False)
            raise JobError(
                f"{_what(loss)} at step {step}; {run.last_saved()}",
                try_="a smaller --set optim.lr in a new run: this one would come to the same when resumed",
            )
        self.value, self.finite_steps = self.value / 2, 0
        if self.value < _SMALLEST:
            raise JobError(
                f"{_what(loss)} at step {step} in fp16, even at a loss scale of {self.value * 2:g}; {run.last_saved()}",
                try_="--set dtype=bfloat16, or a smaller optim.lr",
            )


def _what(loss: float) -> str:
    return "gradients are NaN or infinite" if math.isfinite(loss) else f"the loss is {loss}"
