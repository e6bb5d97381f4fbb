"""The compiled step's ATen graph for CUDA tensors, traced without CUDA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bench.step.race import ARCHS, CLASSES
from bench.step.static import Case
from cammask_fast.data.types import Batch
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import VisionTransformer
from cammask_fast.state import TrainState
from cammask_fast.step import build_strategy, build_train_step, sample_step_randomness

aten, CUDA = torch.ops.aten, torch.device("cuda", 0)
MASK_ALIGNMENT = 16
"""Elements to which PyTorch pads the rows of an attention mask on CUDA."""


def cpu_graph(case: Case) -> GraphModule:
    """One optimiser step as one graph of fake CPU tensors: autograd's transforms are gone, the weights change in place."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: object) -> Callable[..., Any]:
        graph.graph.eliminate_dead_code()
        graph.recompile()
        graphs.append(graph)
        (output,) = graph.graph.find_nodes(op="output")
        results = [value.meta["val"] if isinstance(value, Node) else value for value in output.args[0]]
        return make_boxed_func(lambda *_: results)  # as if it had run

    vit, count = replace(ARCHS[case.arch], layers=case.depth), case.batch
    config = replace(case.config, precision="bf16")
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # a copy of a teacher asks for it
        student = Classifier(VisionTransformer(vit), torch.zeros(CLASSES, vit.output_dim)).requires_grad_(True)
        teacher = student.frozen_copy()
        labels = torch.zeros(count, dtype=torch.int64)
        images = torch.zeros(count, vit.image_size, vit.image_size, 3, dtype=torch.uint8)
        data = Batch(images, labels, labels)
        draws = sample_step_randomness(build_strategy(config), data, vit.patches, torch.Generator().manual_seed(0))
        state = TrainState.create(student, config, steps_per_epoch=3, compiled=True)
        backend = aot_autograd(fw_compiler=keep, keep_inference_input_mutations=True)
        build_train_step(state, teacher, config, backend=backend)([(data, draws)])
    (graph,) = graphs
    return graph


class _OnCuda(Interpreter):
    """Runs a graph of CPU tensors on CUDA tensors: PyTorch's fused attention has operators of its own there."""

    def __init__(self, graph: GraphModule):
        super().__init__(graph)
        self._forward: dict[int, Any] = {}
        """Results of a fused attention by the id of its logsumexp, which its backward is given."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        kwargs = {**kwargs, "device": CUDA} if "device" in kwargs else dict(kwargs)
        if target is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return self._attention(*args, **kwargs)
        if target is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            return self._attention_backward(*args, **kwargs)
        return super().call_function(target, args, kwargs)

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout: float = 0.0,
        causal: bool = False,
        *,
        attn_mask: Any = None,
        scale: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Flash attention, or under a mask, which flash does not take, memory-efficient attention."""
        assert dropout == 0.0
        assert not causal
        if attn_mask is None:
            results = aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, False, scale=scale)
        else:
            mask = _expanded_mask(attn_mask, q, k)
            results = aten._scaled_dot_product_efficient_attention.default(q, k, v, mask, True, 0.0, False, scale=scale)
            results = (*results, mask)
        self._forward[id(results[1])] = results
        return results[0], results[1]

    def _attention_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *_: Any,
        attn_mask: Any = None,
        scale: Any = None,
    ) -> Any:
        rest = self._forward[id(lse)][2:]
        if attn_mask is None:
            cum_q, cum_k, max_q, max_k, seed, offset = rest[:6]
            return aten._scaled_dot_product_flash_attention_backward.default(
                grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset, scale=scale
            )
        seed, offset, mask = rest
        wanted = [True, True, True, False]
        return aten._scaled_dot_product_efficient_attention_backward.default(
            grad, q, k, v, mask, out, lse, seed, offset, 0.0, wanted, False, scale=scale
        )[:3]


def _expanded_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """As PyTorch's front end prepares a mask: rows padded to a multiple of 16, then a view of (N, A, L, L)."""
    length = mask.shape[-1]
    padded = torch.nn.functional.pad(mask, (0, -length % MASK_ALIGNMENT))[..., :length]
    return padded.expand(len(q), q.shape[1], q.shape[2], k.shape[2])


def on_cuda(graph: GraphModule, decompositions: Mapping[Any, Any]) -> tuple[GraphModule, list[Any], FakeTensorMode]:
    """The graph over fake CUDA tensors, after decompositions; its inputs and the mode that they live in."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with mode, torch.no_grad():
        inputs = [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=CUDA) if isinstance(v, Tensor) else v for v in values
        ]
        traced = make_fx(lambda *given: _OnCuda(graph).run(*given), decomposition_table=dict(decompositions))(*inputs)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced, inputs, mode
