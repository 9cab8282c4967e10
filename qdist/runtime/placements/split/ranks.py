"""A rank of a split backbone: a pipeline stage, or the single process that runs GPU after GPU."""

from typing import Any

import torch

from qdist.core.errors import PlanError
from qdist.core.planning.plan import Plan
from qdist.runtime.engine.deepspeed import DeepSpeedEngine
from qdist.runtime.engine.objective import Forward, Passes, ScoreBatches
from qdist.runtime.engine.torch import Adapter, TorchEngine
from qdist.runtime.model.skeleton import offload
from qdist.runtime.placements.base import PROCESS_GROUP_TIMEOUT, Built, LoneRank, Placement, optimizer_maker
from qdist.runtime.placements.split.engine import PipelineEngine, deepspeed_over_stage
from qdist.runtime.placements.split.line import Line
from qdist.runtime.placements.split.pipeline import Pipeline
from qdist.runtime.placements.split.stages import arrange_stage, make_grid, spread


def split(plan: Plan, rank: int, devices: tuple[torch.device, ...]) -> Placement:
    """The rank of a split plan, according to its schedule."""
    return (Sequential if plan.schedule == "sequential" else Stage)(plan, rank, devices)


class Sequential(LoneRank):
    """One process over all GPUs, with some layers possibly offloaded to host memory."""

    def arrange(self, model: Any) -> None:
        spread(model, [self.devices[position] for position in self.plan.layer_map])
        offload(model, self.plan.offloaded_layers)


class Stage(LoneRank):
    """A rank with consecutive layers. The stages of a group share their micro-batches; none has a whole model."""

    @property
    def can_answer(self) -> bool:
        return False

    @property
    def data_rank(self) -> int:
        return self.plan.ranks[self.rank].group

    @property
    def adapter_parts(self) -> int:
        """Number of stages: ranks are numbered group by group, and stage by stage within one."""
        return self.plan.gpus_per_group

    def arrange(self, model: Any) -> None:
        arrange_stage(self.plan, self.rank)(model)

    def build(self, accelerator: Any, adapter: Adapter, forward: Forward) -> Built:
        plan, device = self.plan, self.devices[0]
        if plan.zero_stage == 3:
            raise PlanError("ZeRO-3 does not go with split: the stages share no parameters", try_="--set zero.stage=2")
        grid = make_grid(plan, timeout=PROCESS_GROUP_TIMEOUT)
        pipeline = Pipeline(forward, grid, hidden_size=plan.facts.hidden, pad_id=forward.samples.pad_id, device=device)
        clip, optimizer_of = plan.spec.optim.clip, optimizer_maker(plan)
        inner: TorchEngine | DeepSpeedEngine
        if plan.engine == "torch":
            inner = TorchEngine(adapter, optimizer_of(adapter), clip=clip, across=grid.over_stages)
        else:
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            twins, engine = deepspeed_over_stage(adapter, optimizer_of, config, grid)
            inner = DeepSpeedEngine(twins, engine, clip=clip, group=grid.peers, across=grid.over_stages)
        engine = PipelineEngine(pipeline, adapter, inner)
        return Built(engine, engine.evaluate, pipeline.line.score)

    def scoring(self, passes: Passes) -> ScoreBatches:
        grid = make_grid(self.plan, timeout=PROCESS_GROUP_TIMEOUT)
        return Line(passes, grid, hidden_size=self.plan.facts.hidden, device=self.devices[0]).score
