"""What do QA-LoRA adapters add to each group of a GPTQ checkpoint, what was merged into it before included?"""

from math import gcd

import torch

from qdist.core.errors import RunError
from qdist.runtime.exports.gptq_base import GptqBase, Packed
from qdist.runtime.exports.update import Adapters, require_finite
from qdist.runtime.packed_folder import read_tensor

OFFSET = ".weight_offset"


class GroupUpdates:
    """Updates by group, in weight units. Raises RunError where an adapter is plain LoRA: no group shares its update."""

    def __init__(self, base: GptqBase, adapters: Adapters) -> None:
        if adapters.pool == 1:
            raise RunError(
                f"{adapters.runs[0].path} has plain LoRA, which changes each weight by itself, not groups of them",
                try_="qdist export --to 16bit, or --to gptq",
            )
        packed = {linear.path for file in base.files for linear in base.linears(file)}
        plain = sorted(adapters.paths - packed)
        if plain:
            raise RunError(
                f"the adapter changes {len(plain)} linears that the checkpoint has in 16 bits, such as {plain[0]}",
                try_="qdist export --to 16bit",
            )
        self._base, self._adapters, old = base, adapters, base.gptq.offset
        self.size = gcd(adapters.pool, old.group_size) if old else adapters.pool
        """Inputs that share an update."""
        leaves = {path.rpartition(".")[2] for path in adapters.paths}
        self.leaves = tuple(sorted(leaves | set(old.linears if old else ())))
        """Leaf names of the linears that are changed."""

    def linears(self, file: str) -> list[Packed]:
        """Those that are changed and have their words in a file."""
        return [linear for linear in self._base.linears(file) if linear.path.rpartition(".")[2] in self.leaves]

    def groups(self, linear: Packed) -> int:
        """Of its inputs."""
        return linear.inputs // self.size

    def whole(self, file: str, linear: Packed) -> torch.Tensor:
        """Float32 [groups, out]: the update, and what was merged before."""
        update, old, folder = self.update(linear), self._base.gptq.offset, self._base.folder
        if old is None or folder is None or not old.of(linear.path):
            return update
        stored = read_tensor(folder / file, linear.path + OFFSET, self._base.backbone.sums)
        before = stored.float() * old.scale
        whole = update + before.repeat_interleave(old.group_size // self.size, dim=0)
        require_finite(whole, linear.path)
        return whole

    def update(self, linear: Packed) -> torch.Tensor:
        """Float32 [groups, out]: what the adapters add."""
        update = self._adapters.of(linear.path)
        if update is None:
            return torch.zeros(self.groups(linear), linear.outputs)
        return update.pooled(self.size)
