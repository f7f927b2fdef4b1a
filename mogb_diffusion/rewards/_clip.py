"""The one CLIP behind PickScore, CLIPScore, HPSv2.1 and the aesthetic predictor, and the pixels that it is given.

Rewards that name the same weights share one copy of them. What happens to a picture before the first layer is fixed
here, in our own code: it does not change with the image library or with the kind of input.

Shapes: B = pictures, S = side of CLIP's input, D = embedding.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mogb_diffusion.errors import InputError
from mogb_diffusion.prompts import in_batches
from mogb_diffusion.rewards._weights import Weights

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
Pictures: TypeAlias = Tensor | Sequence[Any]  # [B, 3, H, W] in [0, 1] or uint8, or PIL images
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Clip:
    """A frozen CLIP and its tokenizer.

    Args:
        weights: Of a ``transformers.CLIPModel``.
        tokenizer: Its tokenizer.
    """

    def __init__(self, weights: Weights, tokenizer: Any) -> None:
        self.weights = weights
        self.tokenizer = tokenizer
        self.device = weights.device
        self._one_at_a_time = threading.Lock()  # rewards score in threads, and tokenizers hold what they are set to
        self.size = int(weights.model.config.vision_config.image_size)
        self.scale = float(weights.model.logit_scale.detach().float().exp())

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """The unit embeddings ``[B, D]``, in float32, of normalised pixels ``[B, 3, S, S]``."""
        pixels = pixels.to(self.device, self.weights.dtype)
        with self.weights.on_device() as model:
            pooled = model.vision_model(pixel_values=pixels).pooler_output
            return functional.normalize(model.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """The unit embeddings ``[B, D]``, in float32; longer texts than CLIP can take are cut."""
        limit = int(self.weights.model.config.text_config.max_position_embeddings)
        with self._one_at_a_time:
            tokens = self.tokenizer(
                list(texts), padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
            )
        chosen = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask") if key in tokens}
        with self.weights.on_device() as model:
            pooled = model.text_model(**chosen).pooler_output
            return functional.normalize(model.text_projection(pooled).float(), dim=-1)


@cache
def load_clip(model: str, tokenizer: str, device: str, dtype: str, offload: bool = False) -> Clip:
    """The CLIP of this name, from the hub, its cache or a folder; one copy for all rewards that ask for the same.

    Raises:
        InputError: transformers is missing, the weights cannot be found, or an option is unknown.
    """
    transformers = import_transformers()
    try:
        found = transformers.CLIPModel.from_pretrained(model)
        words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise InputError(missing(model if "found" not in locals() else tokenizer, error)) from error
    return Clip(Weights(found.to(as_dtype(dtype)), as_device(device), offload), words)


def import_transformers() -> Any:
    """The module.

    Raises:
        InputError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError('This reward needs transformers: pip install "mogb[diffusion]".') from error
    return transformers


def as_dtype(name: str) -> torch.dtype:
    """The dtype of this name."""
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, but got {name!r}.")
    return DTYPES[name]


def as_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is this process's GPU where there is one.

    Raises:
        InputError: There is none.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, but got {name!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={name!r}, but torch sees no CUDA device: use device='cpu'.")
    return device


def missing(name: str, error: Exception) -> str:
    """What to do about weights that are not there."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"The weights {name!r} cannot be loaded ({first}). Fetch them once with `hf download {name}` on a machine that "
        "reaches the hub, or give a folder that holds them."
    )


def fetch(repository: str, file: str) -> Path:
    """A file of the hub, or of its cache.

    Raises:
        InputError: It is in neither.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:
        raise InputError(missing(f"{repository} {file}", error)) from error


def as_unit_floats(pictures: Pictures) -> Tensor:
    """Pictures as float32 ``[B, 3, H, W]`` in [0, 1], whatever they came as.

    Raises:
        InputError: Another shape or type, or numbers outside of [0, 1].
    """
    if not isinstance(pictures, Tensor):
        arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
        pictures = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise InputError(f"images must have the shape [B, 3, H, W], but got {list(pictures.shape)}.")
    if pictures.dtype == torch.uint8:
        return pictures.float() / 255
    if not pictures.is_floating_point():
        raise InputError(f"images must be floating-point numbers in [0, 1] or uint8, but got {pictures.dtype}.")
    pictures = pictures.detach().float()
    low, high = pictures.aminmax() if pictures.numel() else (torch.zeros(()), torch.zeros(()))
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise InputError(f"images must lie in [0, 1], but got numbers from {low:.3g} to {high:.3g}.")
    return pictures.clamp(0, 1)


def eight_bit(pictures: Pictures) -> Tensor:
    """The same as uint8, rounded to the nearest of 256 levels."""
    return (as_unit_floats(pictures) * 255).round().to(torch.uint8).cpu()


def normalise(pixels: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """From [0, 1] to what a network was trained on: CLIP, if nothing else is said."""
    middle, spread = (torch.tensor(numbers, device=pixels.device).view(3, 1, 1) for numbers in (mean, std))
    return (pixels - middle) / spread


def bicubic_crop(pictures: Pictures, size: int, *, rounded: bool = False) -> Tensor:
    """CLIP's own preprocessing: the short side to ``size`` with Pillow's bicubic filter in 8 bits, then the centre.

    Where the centre lies between two pixels, transformers rounds its corner down; ``rounded`` does as torchvision,
    which takes the nearest, or the even one.
    """
    from PIL import Image

    out = []
    for picture in eight_bit(pictures):
        image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        width, height = _short_side(image.width, image.height, size)
        resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        out.append(torch.from_numpy(_centre(resized, size, rounded).copy()).permute(2, 0, 1))
    return normalise(torch.stack(out).float() / 255)


def bilinear_crop(pictures: Pictures, size: int) -> Tensor:
    """The short side to ``size`` with an antialiased bilinear filter in float, then the centre (Flow-GRPO's)."""
    pixels = as_unit_floats(pictures)
    width, height = _short_side(pixels.shape[3], pixels.shape[2], size)
    pixels = functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return normalise(pixels[:, :, top : top + size, left : left + size])


def bicubic_pad(pictures: Pictures, size: int) -> Tensor:
    """The long side to ``size`` with an antialiased bicubic filter in float, black around it (HPSv2's)."""
    pixels = as_unit_floats(pictures)
    height, width = pixels.shape[2:]
    ratio = size / max(height, width)
    shape = (round(height * ratio), round(width * ratio))
    if shape != (height, width):
        pixels = functional.interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False)
    down, right = size - shape[0], size - shape[1]
    pixels = functional.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
    return normalise(pixels)


PREPROCESSING = {"bicubic_crop": bicubic_crop, "bilinear_crop": bilinear_crop, "bicubic_pad": bicubic_pad}
Preprocessing: TypeAlias = Literal["bicubic_crop", "bilinear_crop", "bicubic_pad"]


def _short_side(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height with the short one at ``size`` and the long one rounded down, as CLIP's code does."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def _centre(array: np.ndarray, size: int, rounded: bool) -> np.ndarray:
    top, left = (round(excess / 2) if rounded else excess // 2 for excess in (side - size for side in array.shape[:2]))
    return array[top : top + size, left : left + size]


def score_in_batches(count: int, batch_size: int, score: Callable[[slice], Tensor]) -> Tensor:
    """The scores ``[count]`` of all pictures, on the CPU, from those of ``batch_size`` at once."""
    parts = [score(slice(part[0], part[-1] + 1)).cpu() for part in in_batches(range(count), batch_size)]
    return torch.cat(parts) if parts else torch.zeros(0)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file. No code in it is run.

    Raises:
        InputError: The file is missing, damaged, or holds something else than tensors.
    """
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    held = held.get("state_dict", held) if isinstance(held, Mapping) else held
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise InputError(f"{path} holds no state_dict of tensors.")
    return {str(key).removeprefix("module."): value for key, value in held.items()}


HEAD_LAYERS = (0, 2, 4, 6, 7)  # of the published heads; dropout lies between, and no activation


def linear_head(state: Mapping[str, Tensor], stem: str = "") -> nn.Sequential:
    """The five linear layers ``layers.N.weight`` and ``.bias`` of a checkpoint, in float32.

    Raises:
        InputError: It holds other layers below ``stem``.
    """
    wanted = [f"{stem}layers.{index}.{kind}" for index in HEAD_LAYERS for kind in ("weight", "bias")]
    held = sorted(name for name in state if name.startswith(stem))
    if held != sorted(wanted):
        raise InputError(f"The head must hold {wanted[:2]} ... {wanted[-1:]}, but holds {held[:3]} ({len(held)} keys).")
    layers = []
    for index in HEAD_LAYERS:
        weight, bias = (state[f"{stem}layers.{index}.{kind}"].float() for kind in ("weight", "bias"))
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(False)
