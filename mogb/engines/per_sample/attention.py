"""torch.nn.MultiheadAttention, whose projections are functional: it is run as its four matrix products, each tapped.

Shapes: B = samples, T = queries, S = keys, E = width, H = heads.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mogb.engines.per_sample.rules import LinearRule, Rule, Site, Split
from mogb.engines.per_sample.taps import Hub, cast_like_autocast


class AttentionRule(Rule):
    """Replaces ``forward`` by the same computation in steps."""

    attributes = None

    def problem(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.MultiheadAttention)
        extra = module.bias_k is not None or module.add_zero_attn
        return "add_bias_kv and add_zero_attn append keys" if extra else None

    def install(self, hub: Hub, site: Site) -> list[Any]:
        return [_Steps(hub, site)]

    def split(
        self, site: Site, call: Any, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], samples: int
    ) -> Split:
        """Never called: the sites inside have rules of their own."""
        raise NotImplementedError


class _Steps:
    """The forward method of one attention layer while it is tapped. A copy of the layer gets the original one."""

    def __init__(self, hub: Hub, site: Site) -> None:
        assert isinstance(site.module, nn.MultiheadAttention)
        self.hub, self.site, self.module = hub, site, site.module
        self.module.forward = self  # type: ignore[method-assign]

    def remove(self) -> None:
        """Gives the layer its own forward method back."""
        del self.module.forward

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (type(self.module).forward, self.module)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        module = self.module
        if self.hub.active or self.hub.recording:
            self.site.rule.note(self.hub, self.site, (query,), {})
        if not self.hub.active or query.ndim != 3:
            return type(module).forward(
                module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = (self._heads(projected) for projected in self._project(query, key, value))
        causal_alone = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal_alone else _merged(attn_mask, key_padding_mask, q)
        dropout = module.dropout if module.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.mT
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal and mask is None)
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, T, E]
        mixed = mixed if module.batch_first else mixed.transpose(0, 1)
        out = module.out_proj
        return self._linear(mixed, out.weight, out.bias, "out_proj.weight", "out_proj.bias", 0), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        module, width = self.module, self.module.embed_dim
        biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        if not module._qkv_same_embed_dim:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            return [
                self._linear(x, getattr(module, name), b, name, "in_proj_bias", 0, n * width)
                for n, (x, name, b) in enumerate(zip((query, key, value), names, biases, strict=True))
            ]
        if query is key and key is value:
            weight, bias = module.in_proj_weight, module.in_proj_bias
            return list(self._linear(query, weight, bias, "in_proj_weight", "in_proj_bias", 0).chunk(3, -1))
        weights = module.in_proj_weight.chunk(3)
        return [
            self._linear(x, w, b, "in_proj_weight", "in_proj_bias", n * width * width, n * width)
            for n, (x, w, b) in enumerate(zip((query, key, value), weights, biases, strict=True))
        ]

    def _linear(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_name: str,
        bias_name: str,
        weight_start: int,
        bias_start: int = 0,
    ) -> Tensor:
        inputs = cast_like_autocast(inputs)
        output = F.linear(inputs, weight, bias)
        wanted = tuple(name for name in (weight_name, bias_name) if name in self.site.wanted)
        if not wanted:
            return output
        rule = LinearRule(weight_name, bias_name, weight_start, bias_start)
        site = Site(self.site.name, self.module, self.site.dim, wanted, rule)
        return rule.tap(self.hub, site, (inputs,), {}, output)

    def _heads(self, projected: Tensor) -> Float[Tensor, "B H T D"]:
        projected = projected if self.module.batch_first else projected.transpose(0, 1)
        return projected.unflatten(2, (self.module.num_heads, -1)).transpose(1, 2)


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Both masks as one summand of the scores ``[B, H, T, S]``."""
    total = None
    if attn_mask is not None:
        total = _as_summand(attn_mask, query.dtype)
        total = total if total.ndim == 2 else total.unflatten(0, (-1, query.shape[1] if len(total) > 1 else 1))
    if key_padding_mask is not None:
        padding = _as_summand(key_padding_mask, query.dtype)[:, None, None]
        total = padding if total is None else total + padding
    return total


def _as_summand(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
