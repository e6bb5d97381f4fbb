"""CLIP's image tower with open_clip's parameter names (`visual.*` without the prefix), and the taps that a CAM needs.

The forward is a pure function of (parameters, images, token selection): no hooks, no state, so that
`torch.func.functional_call` and torch.compile see all of it. In the last block only the CLS token's query, projection and
MLP are computed (only the CLS output is read), which leaves features and gradients exactly as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = ("quick_gelu", "gelu")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape of a CLIP image tower. Lengths are in pixels (image, patch) or channels (width, output)."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    output_dim: int
    activation: str = "quick_gelu"
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch size {self.patch_size} does not divide the image size {self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.width}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")

    @property
    def grid(self) -> int:
        """Patches per side, G."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """P = G * G."""
        return self.grid**2

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as stored in checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ViTConfig:
        """The configuration of `to_dict`. Raises ValueError on unknown fields or values that cannot work."""
        known = set(cls.__dataclass_fields__)
        if set(values) - known:
            raise ValueError(f"unknown fields in a ViT configuration: {', '.join(sorted(set(values) - known))}")
        return cls(**values)


@dataclass
class Taps:
    """What a CAM reads from one forward; each list goes from the first layer to the last.

    queries: (N, A, L, d) per layer, in the last layer (N, A, 1, d): the CLS query alone. keys, values: (N, A, L, d).
    outputs: the attention outputs before out_proj, shaped like the queries; MM-CAM takes gradients at them.
    logsumexps: per layer what `saved_logsumexp` gives, where the taps were detached from autograd's graph; empty elsewhere.
    last_ln_1: (N, L, D), ln_1 of the last block; Grad-CAM takes the gradient at it.
    own_scores: record what LeGrad's scores of single layers are made of, with all tokens in the last layer, too. Then also, per
    layer: attended (N, L, D), the residual stream between attention and MLP; hidden (N, L, 4D), what the MLP's activation
    takes (times 1.702 for quick_gelu); pooled (N, D), the mean over tokens of the layer's output, in float32 at least.
    output_probes, ln_1_probe: zeros that the caller may give in the shapes of `outputs` and `last_ln_1`. They are added there,
    so that a functional transform, which differentiates with respect to inputs only, finds the same gradients at them.
    """

    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    logsumexps: list[Tensor | None] = field(default_factory=list)
    last_ln_1: Tensor | None = None
    output_probes: Sequence[Tensor] = ()
    ln_1_probe: Tensor | None = None
    own_scores: bool = False
    attended: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    pooled: list[Tensor] = field(default_factory=list)

    def detached(self) -> Taps:
        """The same values outside autograd's graph, without the probes."""
        queries, keys, values, outputs = (
            [tensor.detach() for tensor in taps] for taps in (self.queries, self.keys, self.values, self.outputs)
        )
        logsumexps = [saved_logsumexp(output) for output in self.outputs]
        last_ln_1 = None if self.last_ln_1 is None else self.last_ln_1.detach()
        attended, hidden, pooled = ([tensor.detach() for tensor in taps] for taps in (self.attended, self.hidden, self.pooled))
        return Taps(
            queries, keys, values, outputs, logsumexps, last_ln_1,
            own_scores=self.own_scores, attended=attended, hidden=hidden, pooled=pooled,
        )  # fmt: skip


def saved_logsumexp(output: Tensor) -> Tensor | None:
    """The logarithms of the softmax denominators that an attention keeps for its backward, whichever of PyTorch's fused
    attentions was chosen.

    Args:
        output: (N, A, L, d), of scaled_dot_product_attention without a mask.

    Returns:
        float32 (N, A, L), float64 for float64, natural logarithms; None where nothing is kept: the plain formula, or no
        gradient is wanted.
    """
    node: Any = output.grad_fn
    if type(node).__name__ not in SAVED_LOGSUMEXP:
        return None
    lse: Tensor = getattr(node, SAVED_LOGSUMEXP[type(node).__name__]).detach()
    lse = lse.squeeze(-1) if lse.ndim == 4 else lse  # cuDNN's is (N, A, L, 1)
    return lse[..., : output.shape[2]]  # the memory-efficient one's is padded


SAVED_LOGSUMEXP = {
    "ScaledDotProductFlashAttentionBackward0": "_saved_logsumexp",
    "ScaledDotProductFlashAttentionForCpuBackward0": "_saved_logsumexp",
    "ScaledDotProductEfficientAttentionBackward0": "_saved_log_sumexp",
    "ScaledDotProductCudnnAttentionBackward0": "_saved_logsumexp",
}
"""By the name of autograd's node."""


class LayerNorm(nn.LayerNorm):
    """Layer norm that computes in the dtype of its weights and returns the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention under the parameter names of nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, L, D) -> (N, A, L, d)

    def forward(self, x: Tensor, *, key_mask: Tensor | None, cls_only: bool, taps: Taps | None) -> Tensor:
        """Attend from every token, or from the CLS token alone.

        Args:
            x: (N, L, D).
            key_mask: bool (N, L), True = no query may attend to that key; None masks nothing.
            cls_only: compute the CLS token's query and projection only.
            taps: queries, keys, values and outputs are appended to it; None records nothing.

        Returns:
            (N, L, D), or (N, 1, D) with `cls_only`.
        """
        if cls_only:
            width = x.shape[-1]
            weights, biases = self.in_proj_weight.split([width, 2 * width]), self.in_proj_bias.split([width, 2 * width])
            q = F.linear(x[:, :1], weights[0], biases[0])
            k, v = F.linear(x, weights[1], biases[1]).chunk(2, dim=-1)
        else:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if key_mask is None else ~key_mask[:, None, None, :])
        if taps is not None:
            if taps.output_probes:
                out = out + taps.output_probes[len(taps.outputs)]
            taps.queries.append(q)
            taps.keys.append(k)
            taps.values.append(v)
            taps.outputs.append(out)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class _QuickGELU(torch.autograd.Function):
    """x * sigmoid(1.702 x) = silu(1.702 x) / 1.702. Its derivative is silu'(1.702 x): the two factors cancel in the backward,
    which autograd does not see. x is overwritten by 1.702 x, the one tensor that the backward needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = x.mul_(1.702)
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(grad, *ctx.saved_tensors)


class MLP(nn.Module):
    """Linear layer, activation (`quick_gelu` or `gelu`), linear layer."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor, *, taps: Taps | None = None) -> Tensor:
        """Map x, (..., D), to the same shape; what the activation takes goes to `taps`, if its `own_scores` asks for it."""
        recorded = taps.hidden if taps is not None and taps.own_scores else None
        if self.activation == "gelu" and recorded is None:
            return self.c_proj(F.gelu(self.c_fc(x)))
        hidden = self.c_fc(x)
        if self.activation == "gelu":
            active = F.gelu(hidden)
        elif torch.compiler.is_compiling():  # the compiler fuses the formula itself
            hidden = 1.702 * hidden
            active = F.silu(hidden) * (1 / 1.702)
        else:
            active = _QuickGELU.apply(hidden)  # which has multiplied it
        if recorded is not None:
            recorded.append(hidden)
        return self.c_proj(active)


def activation_gradient(gradient: Tensor, hidden: Tensor, activation: str) -> Tensor:
    """The gradient before an MLP's activation.

    Args:
        gradient: behind the activation, as it broadcasts to hidden.
        hidden: (N, L, 4D), as `Taps.hidden` has it.
        activation: `quick_gelu` or `gelu`.

    Returns:
        (N, L, 4D).
    """
    gradient = gradient.expand_as(hidden)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(gradient, hidden)
    return torch.ops.aten.silu_backward(gradient, hidden)  # of 1.702 x: the factor is in both, see _QuickGELU


class Block(nn.Module):
    """Pre-norm residual block: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.width)
        self.attn = Attention(config.width, config.heads)
        self.ln_2 = LayerNorm(config.width)
        self.mlp = MLP(config.width, round(config.width * config.mlp_ratio), config.activation)
        residual_std = (2 * config.width * config.layers) ** -0.5
        nn.init.normal_(self.attn.in_proj_weight, std=config.width**-0.5)
        nn.init.normal_(self.attn.out_proj.weight, std=residual_std)
        nn.init.zeros_(self.attn.out_proj.bias)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * config.width) ** -0.5)
        nn.init.normal_(self.mlp.c_proj.weight, std=residual_std)

    def forward(self, x: Tensor, *, key_mask: Tensor | None, cls_only: bool, taps: Taps | None) -> Tensor:
        """Run the block.

        Args:
            x: (N, L, D).
            key_mask: bool (N, L), True = no query may attend to that key; None masks nothing.
            cls_only: compute the CLS token of the result only.
            taps: see `Attention.forward`; with `cls_only`, ln_1's output is recorded too.

        Returns:
            (N, L, D), or (N, 1, D) with `cls_only`.
        """
        normed = self.ln_1(x)
        if cls_only and taps is not None:
            if taps.ln_1_probe is not None:
                normed = normed + taps.ln_1_probe
            taps.last_ln_1 = normed
        x = (x[:, :1] if cls_only else x) + self.attn(normed, key_mask=key_mask, cls_only=cls_only, taps=taps)
        out = x + self.mlp(self.ln_2(x), taps=taps)
        if taps is not None and taps.own_scores:
            taps.attended.append(x)
            taps.pooled.append(out.mean(1, dtype=torch.promote_types(out.dtype, torch.float32)))
        return out


class Transformer(nn.Module):
    """The residual blocks, under open_clip's parameter names; `VisionTransformer` runs them."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(config) for _ in range(config.layers)])


class VisionTransformer(nn.Module):
    """CLIP ViT: normalised images to features (N, E) before normalisation, features = ln_post(x_CLS) @ proj.

    Initialisation follows CLIP inside the blocks (scaled by width and depth); positional embeddings start with std 0.5, which
    lets small models trained from scratch find shapes in a fifth of the steps.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        scale = config.width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(config.width))
        self.positional_embedding = nn.Parameter(0.5 * torch.randn(config.patches + 1, config.width))
        self.proj = nn.Parameter(scale * torch.randn(config.width, config.output_dim))
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.ln_pre = LayerNorm(config.width)
        self.transformer = Transformer(config)
        self.ln_post = LayerNorm(config.width)

    def forward(
        self,
        images: Tensor,
        *,
        kept_tokens: Tensor | None = None,
        key_mask: Tensor | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Features of a batch.

        Args:
            images: normalised with CLIP's mean and std, (N, 3, H, W) or cut into patches, (N, P, 3 * p * p), whose embedding is
                one matrix product.
            kept_tokens: int64 (N, n_keep + 1), the tokens to keep: 0 (CLS) first, then p + 1 for patch p. The others are
                dropped after the positional embedding and ln_pre.
            key_mask: bool (N, P), or (N, n_keep) with kept_tokens; True = no query may attend to that patch, in every block.
            taps: filled in place with what a CAM needs.

        Returns:
            (N, E), not normalised.

        Raises:
            ValueError: for another image size or a mask of the wrong shape.
        """
        size, patches = self.config.image_size, self.config.patches
        per_patch = 3 * self.config.patch_size**2
        if images.shape[1:] not in ((3, size, size), (patches, per_patch)):
            raise ValueError(
                f"images: expected (N, 3, {size}, {size}) or patches (N, {patches}, {per_patch}), got {tuple(images.shape)}"
            )
        keys = patches if kept_tokens is None else kept_tokens.shape[1] - 1
        if key_mask is not None and key_mask.shape != (images.shape[0], keys):
            raise ValueError(f"key_mask: expected ({len(images)}, {keys}), got {tuple(key_mask.shape)}")
        if images.ndim == 3:
            x = F.linear(images, self.conv1.weight.flatten(1))  # (N, P, D)
        else:
            x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)  # (N, L, D)
        if kept_tokens is not None:
            x = x.gather(1, kept_tokens[..., None].expand(-1, -1, x.shape[-1]))
        if key_mask is not None:
            key_mask = F.pad(key_mask, (1, 0))  # CLS is never masked
        last = len(self.transformer.resblocks) - 1
        for layer, block in enumerate(self.transformer.resblocks):
            if layer == last and taps is not None and taps.own_scores:  # all tokens for the map, CLS for the prediction
                with torch.no_grad():
                    block(x.detach(), key_mask=key_mask, cls_only=False, taps=taps)
                taps = None
            x = block(x, key_mask=key_mask, cls_only=layer == last, taps=taps)
        return self.ln_post(x[:, 0].to(self.proj.dtype)) @ self.proj
