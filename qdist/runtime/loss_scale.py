"""The factor that keeps fp16 gradients representable (Micikevicius et al. 2018), the same for every engine."""

from qdist.core.errors import RunError

_INITIAL, _SMALLEST, _LARGEST = 2.0**16, 2.0**-4, 2.0**24
_GROWTH_INTERVAL = 500


class LossScale:
    """Halves when gradients are not finite, doubles after GROWTH_INTERVAL finite steps; fixed at 1 unless fp16."""

    def __init__(self, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = _INITIAL if dynamic else 1.0
        self.finite_steps = 0

    def update(self, *, skipped: bool, step: int) -> None:
        """Take note of a step.

        Raises RunError when gradients are not finite for a reason that no scale can mend.
        """
        if not skipped:
            self.finite_steps += 1
            if self.dynamic and self.finite_steps >= _GROWTH_INTERVAL and self.value < _LARGEST:
                self.value, self.finite_steps = self.value * 2, 0
            return
        if not self.dynamic:
            raise RunError(
                f"gradients are NaN or infinite at step {step}; the last checkpoint is from before it",
                try_="a smaller optim.lr, then --resume; or look at the samples of this step",
            )
        self.value, self.finite_steps = self.value / 2, 0
        if self.value < _SMALLEST:
            raise RunError(
                f"fp16 gradients overflow at step {step} even at a loss scale of {self.value * 2:g}",
                try_="--set dtype=bfloat16, or a smaller optim.lr",
            )
