"""Hardware by name: how the same pictures are cut up, and what leaves the GPU, so that a recipe fits.

A preset never changes how many prompts an epoch has, nor how many pictures of each: the run is the same run.
"""

from dataclasses import dataclass, replace

from mogb_diffusion.checks import named
from mogb_diffusion.config import Reward, Run, TextEncoders


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Some GPUs.

    Attributes:
        name: Nodes (where there are several), GPUs of each, and their memory.
        nodes: How many machines.
        gpus: On each.
        memory: Of a GPU, in GiB, as drivers report it.
        micro_batch: Pictures per forward and backward pass.
        sampling_batch: Pictures that are sampled, and decoded, at once.
        gradient_checkpointing: See :class:`mogb_diffusion.config.Model`.
        text_encoders: See :class:`mogb_diffusion.config.Model`.
        offload_rewards: Whether networks of rewards are on the GPU only while they score.
    """

    name: str
    nodes: int = 1
    gpus: int
    memory: float
    micro_batch: int
    sampling_batch: int
    gradient_checkpointing: bool = False
    text_encoders: TextEncoders = "resident"
    offload_rewards: bool = False

    @property
    def ranks(self) -> int:
        """Processes: one for each GPU."""
        return self.nodes * self.gpus

    def launch(self, recipe: str) -> str:
        """The command that trains a recipe."""
        command = f"train {recipe} --preset {self.name}"
        if self.ranks == 1:
            return f"mogb-diffusion {command}"
        where = "--standalone" if self.nodes == 1 else (
            f"--nnodes {self.nodes} --rdzv_backend c10d --rdzv_endpoint HOST:29500"
        )  # fmt: skip
        return f"torchrun {where} --nproc_per_node {self.gpus} -m mogb_diffusion {command}"

    def __call__(self, run: Run) -> Run:
        """The run, cut for this hardware."""
        return replace(
            run,
            batch=replace(run.batch, micro_batch=self.micro_batch, sampling_batch=self.sampling_batch),
            model=replace(
                run.model, gradient_checkpointing=self.gradient_checkpointing, text_encoders=self.text_encoders
            ),
            rewards=tuple(map(self._placed, run.rewards)),
            evaluation=replace(
                run.evaluation,
                batch=min(run.evaluation.batch, self.sampling_batch),
                rewards=tuple(map(self._placed, run.evaluation.rewards)),
            ),
        )

    def _placed(self, reward: Reward) -> Reward:
        if not self.offload_rewards or "device" not in reward.options:
            return reward
        return replace(reward, options={**reward.options, "offload": True})


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(name="1x24gb", gpus=1, memory=23.5, micro_batch=8, sampling_batch=4, gradient_checkpointing=True,
               text_encoders="offload", offload_rewards=True),
        Preset(name="1x80gb", gpus=1, memory=79.0, micro_batch=12, sampling_batch=12),
        Preset(name="8x80gb", gpus=8, memory=79.0, micro_batch=9, sampling_batch=9),
        Preset(name="2x8x80gb", nodes=2, gpus=8, memory=79.0, micro_batch=9, sampling_batch=9),
    )
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        InputError: There is none; the message lists what exists.
    """
    return named("preset", name, PRESETS)
