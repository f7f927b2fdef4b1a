"""Any Stable Diffusion 3 pipeline of diffusers as three functions: encode prompts, velocity, decode.

Shapes: B = pictures, T = text tokens; latents are ``[B, C, H, W]``, images ``[B, 3, h, w]`` in [0, 1].
"""

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from mogb_diffusion import config, flow
from mogb_diffusion.errors import InputError
from mogb_diffusion.memory import REMEMBERED

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Text:
    """What the transformer sees of B prompts.

    Attributes:
        tokens: ``[B, T, D]``.
        pooled: ``[B, D']``.
    """

    tokens: Tensor
    pooled: Tensor

    def __getitem__(self, rows: Sequence[int] | Tensor) -> "Text":
        index = torch.as_tensor(rows, device=self.tokens.device)
        return Text(self.tokens[index], self.pooled[index])

    def __len__(self) -> int:
        return len(self.tokens)


class SD3Model:
    """A ``StableDiffusion3Pipeline`` whose transformer can be trained.

    Args:
        pipeline: Any; its transformer is changed in place (frozen, moved, adapters are added by the policy).
        device: Where everything runs.
        dtype: What the transformer computes in. bfloat16 and float16 are autocast; float64 runs all of it, also
            diffusers' RMSNorm, which otherwise takes its mean square in float32.
        max_sequence_length: Tokens of the T5 encoder.
        resolution: Side of the pictures; None is the transformer's own.
        text_encoders: Where they are: ``resident`` on the device, or elsewhere until they are needed, see
            :meth:`prepare` and :meth:`precompute`.

    Attributes:
        pipeline: The pipeline.
        latent_shape: ``(C, H, W)``.
        dtype: Of latents and velocities: float32, or float64.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_sequence_length: int = 128,
        resolution: int | None = None,
        text_encoders: config.TextEncoders = "resident",
    ) -> None:
        self.pipeline = pipeline
        self.device = torch.device(device)
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.compute_dtype = dtype
        self.max_sequence_length = max_sequence_length
        self.text_encoders = text_encoders
        for part in (pipeline.transformer, pipeline.vae):
            part.requires_grad_(False).eval().to(self.device)
        for part in self._encoders():
            part.requires_grad_(False).eval().to(self.device if text_encoders == "resident" else "cpu")
        nn.Module.to(pipeline.vae, torch.float32)  # as in the reference: half precision shows in pictures
        nn.Module.to(pipeline.transformer, dtype)  # diffusers' own warns, whatever there is to warn of
        if dtype == torch.float64:
            _use_exact_norms(pipeline.transformer)
            for part in self._encoders():
                part.to(dtype)
        scale = int(pipeline.vae_scale_factor)
        size = pipeline.transformer.config.sample_size if resolution is None else resolution // scale
        patch = pipeline.transformer.config.patch_size
        if resolution is not None and resolution % (scale * patch):
            raise InputError(f"model.resolution: must be a multiple of {scale * patch}, but got {resolution}.")
        self.latent_shape = (int(pipeline.transformer.config.in_channels), size, size)
        self.gradient_checkpointing = False
        self._known: dict[str, Text] = {}  # as the encoders give them; in main memory if they are not resident
        self._all_known = False

    @property
    def transformer(self) -> nn.Module:
        """What trains."""
        module: nn.Module = self.pipeline.transformer
        return module

    def encode(self, texts: Sequence[str]) -> Text:
        """The embeddings of prompts; those of the last few hundred are remembered (1.7 MB each on the big model).

        That of a prompt is the same to the bit whatever else is asked for, before it or with it.

        Raises:
            InputError: A prompt that was not there when all were encoded and the encoders dropped.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new and self._all_known:
            raise InputError(
                f"model.text_encoders: precompute has no embedding of {new[0]!r}, which is no prompt of the run: set "
                "it to offload."
            )
        if new and len(self._known) > REMEMBERED:
            self._known = {text: known for text, known in self._known.items() if text in texts}
        self._learn(new)
        found = [self._known[text] for text in texts]
        return Text(
            torch.cat([text.tokens for text in found]).to(self.device, self.dtype),
            torch.cat([text.pooled for text in found]).to(self.device, self.dtype),
        )

    def prepare(self, texts: Sequence[str]) -> None:
        """Encodes prompts that are needed soon, all at once, so that encoders that are elsewhere come only once."""
        if self.text_encoders != "resident" and not self._all_known:
            self.encode(texts)

    def embedding_bytes(self) -> int:
        """What the embedding of a prompt takes; measured on the empty one, which every run remembers."""
        self._learn([text for text in ("",) if text not in self._known])
        own = self._known[""]
        return own.tokens.nbytes + own.pooled.nbytes

    def precompute(self, texts: Sequence[str]) -> None:
        """Encodes all prompts that will ever be asked for, the empty one too, and drops the encoders."""
        self._learn([text for text in dict.fromkeys(("", *texts)) if text not in self._known])
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(self.pipeline, name, None) is not None:
                setattr(self.pipeline, name, None)
        self._all_known = True

    @torch.no_grad()
    def _learn(self, texts: Sequence[str]) -> None:
        """Encodes prompts that are not known yet, one at a time.

        Which of them are new depends on what was asked for before, and rounding on the size of a batch: together, their
        embeddings would depend on the history of the process, which no checkpoint holds.
        """
        if not texts:
            return
        is_away = self.text_encoders != "resident"
        keep = torch.device("cpu") if is_away else self.device
        with self._encoders_here() if is_away else contextlib.nullcontext():
            for text in texts:
                tokens, _, pooled, _ = self.pipeline.encode_prompt(
                    prompt=[text], prompt_2=None, prompt_3=None, device=self.device,
                    do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length,
                )  # fmt: skip
                self._known[text] = Text(tokens.to(keep, copy=True), pooled.to(keep, copy=True))

    @contextlib.contextmanager
    def _encoders_here(self) -> Iterator[None]:
        """Within the block the text encoders are on the device."""
        try:
            for part in self._encoders():
                part.to(self.device)
            yield
        finally:
            for part in self._encoders():
                part.to("cpu")

    def velocity(self, latents: Tensor, time: Float[Tensor, " B"] | float, text: Text) -> Tensor:
        """The velocity at a time in [0, 1], ``[B, C, H, W]`` in :attr:`dtype`, with gradient where that is enabled."""
        times = torch.as_tensor(time, dtype=self.dtype, device=self.device).expand(len(latents))
        with self._autocast():
            (velocity,) = self.transformer(
                hidden_states=latents.to(self.device, self.dtype),
                timestep=times * flow.TRAIN_TIMESTEPS,
                encoder_hidden_states=text.tokens,
                pooled_projections=text.pooled,
                return_dict=False,
            )
        result: Tensor = velocity.to(self.dtype)
        return result

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Float[Tensor, "B 3 h w"]:
        """Images in [0, 1], float32."""
        vae = self.pipeline.vae
        weight = next(vae.parameters())
        scaled = latents.to(weight) / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(scaled, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def sigmas(self, steps: int) -> Float64[Tensor, " S"]:
        """The sampling grid that the pipeline itself would use."""
        return flow.sd3_sigmas(steps, shift=float(self.pipeline.scheduler.config.shift))

    def _autocast(self) -> Any:
        if self.compute_dtype in (torch.float16, torch.bfloat16):
            return torch.autocast(self.device.type, self.compute_dtype)
        return contextlib.nullcontext()

    def _encoders(self) -> Iterator[nn.Module]:
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if (encoder := getattr(self.pipeline, name, None)) is not None:
                yield encoder


def load_model(choice: config.Model, device: torch.device) -> SD3Model:
    """The pipeline that a configuration names.

    Raises:
        InputError: It cannot be loaded; the message says why.
    """
    dtype = DTYPES[choice.dtype]
    is_tiny = choice.source in ("tiny", "tiny-random") or choice.source.endswith(".safetensors")
    pipeline = _tiny(choice) if is_tiny else _pretrained(choice.source, dtype)
    if is_tiny and device.type == "cpu" and dtype == torch.bfloat16:
        from mogb_diffusion.models.tiny import MatmulAttention

        pipeline.transformer.set_attn_processor(MatmulAttention())
    length = choice.max_sequence_length
    if length is None:
        length = 1 if is_tiny or getattr(pipeline, "text_encoder_3", None) is None else 128
    return SD3Model(
        pipeline, device=device, dtype=dtype, max_sequence_length=length, resolution=choice.resolution,
        text_encoders=choice.text_encoders,
    )  # fmt: skip


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a configuration; ``auto`` is this process's GPU where there is one.

    Raises:
        InputError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model.device: {name!r} cannot be used here: {reason}") from None
    return device


def _tiny(choice: config.Model) -> Any:
    from mogb_diffusion.models import tiny

    if choice.source == "tiny-random":
        return tiny.build(choice.seed)
    try:
        return tiny.load(None if choice.source == "tiny" else choice.source)
    except (OSError, ValueError) as error:
        raise InputError(f"model.source: {choice.source!r} cannot be loaded: {' '.join(str(error).split())}") from None


def _pretrained(source: str, dtype: torch.dtype) -> Any:
    try:
        from diffusers import StableDiffusion3Pipeline
    except ImportError as error:
        raise InputError(f"This needs {error.name}. Install it with: pip install 'mogb[diffusion]'") from error
    absent: dict[str, None] = {}
    index = Path(source) / "model_index.json"
    if index.exists():  # diffusers wants the parts that a pipeline lacks named
        parts = json.loads(index.read_text())
        absent = dict.fromkeys(name for name, value in parts.items() if value == [None, None])
    elif Path(source).exists():
        raise InputError(f"model.source: {source} is no pipeline: it has no model_index.json.")
    narrow = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    try:
        with warnings.catch_warnings():  # the new name, dtype, is not known to every version that is supported
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            return StableDiffusion3Pipeline.from_pretrained(source, torch_dtype=narrow, **absent)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model.source: {source!r} cannot be loaded: {reason}") from None


def _use_exact_norms(module: nn.Module) -> None:
    """Replaces RMSNorms that go through float32 by PyTorch's own."""
    for name, child in module.named_children():
        if type(child).__name__ == "RMSNorm" and not isinstance(child, nn.RMSNorm):
            exact = nn.RMSNorm(tuple(child.dim), eps=child.eps, elementwise_affine=child.weight is not None)  # type: ignore[arg-type]
            if child.weight is not None:
                exact.weight = child.weight  # type: ignore[assignment]
            setattr(module, name, exact.to(torch.float64).requires_grad_(False))
        else:
            _use_exact_norms(child)
