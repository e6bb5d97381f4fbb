"""Parity with the authors' code on the committed golden files, and proof that the comparison can fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import parity
from tests.helpers.parity_golden import Array, Golden, Quantity, read_arrays

GOLDEN = Path(__file__).parent / "golden"
Computed = tuple[dict[str, Array], dict[str, Quantity], set[str]]


@pytest.fixture(scope="module")
def computed() -> Computed:
    """All arrays of the tiny model, its gradients included, and what our code makes of them."""
    arrays = read_arrays(GOLDEN / "tiny-seed0.npz")
    return arrays, *parity.compute(arrays)


def failures(arrays: dict[str, Array], quantities: dict[str, Quantity], inputs: set[str]) -> set[str]:
    return {check.name for check in parity.check(arrays, quantities, inputs) if not check.passed}


def corrupted(golden: Array, quantity: Quantity, position: int) -> Array:
    """A copy with one element off by three times what is allowed, or by the smallest step where nothing is."""
    wrong = golden.copy()
    flat = wrong.reshape(-1)
    if golden.dtype == bool:
        flat[position] ^= True
    elif golden.dtype.kind in "iu":
        flat[position] ^= 1
    elif quantity.tolerance == 0:
        flat[position] = np.nextafter(flat[position], np.inf, dtype=golden.dtype)
    else:
        flat[position] += 3 * quantity.tolerance * np.broadcast_to(quantity.scale, golden.shape).flat[position]
    return wrong


def test_every_committed_file_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(GOLDEN.glob("*.npz"))
    assert [file.name for file in files] == [
        "mid-seed0.npz", "tiny-seed0-grads-a.npz", "tiny-seed0-grads-b.npz", "tiny-seed0.npz",
    ]  # fmt: skip
    code = parity.main([str(file) for file in files])
    printed = capsys.readouterr().out
    assert code == 0, [line for line in printed.splitlines() if "FAIL" in line]
    assert printed.count(" ok") == sum(len(read_arrays(file)) for file in files)


@pytest.mark.parametrize("file", ["tiny-seed0", "tiny-seed0-grads-a", "tiny-seed0-grads-b"])
@pytest.mark.parametrize("which", ["first", "last"])
def test_one_wrong_value_in_any_checked_array_is_caught_by_name(computed: Computed, file: str, which: str) -> None:
    _, quantities, inputs = computed
    arrays = read_arrays(GOLDEN / f"{file}.npz")
    checked = arrays.keys() & quantities.keys()
    assert len(checked) >= (150 if file == "tiny-seed0" else 138)
    assert failures(arrays, quantities, inputs) == set()
    for name in checked:
        wrong = corrupted(arrays[name], quantities[name], 0 if which == "first" else -1)
        assert failures({name: wrong} | {n: a for n, a in arrays.items() if n != name}, quantities, inputs) == {name}


def test_the_allowance_for_rounding_stays_small(computed: Computed) -> None:
    """What three AdamW steps amplify may be widened by float32's own error, not by so much that a fault would fit."""
    golden, quantities, _ = computed
    for name in ("loss", "loss_task", "loss_distill", "grad_norm_before_clip", "features_after", "logits_after"):
        quantity = quantities[f"adamw/{name}"]
        allowed = (quantity.tolerance * quantity.scale / np.abs(golden[f"adamw/{name}"]).max()).max()
        assert allowed < 1e-4, name


def test_sums_in_another_order_are_the_same_function() -> None:
    """In float64 the same training up to its rounding; in float32 other roundings of the same size."""
    golden = Golden(read_arrays(GOLDEN / "mid-seed0.npz"))
    random = torch.Generator().manual_seed(0)
    for dtype, least, most in ((torch.float64, 0.0, 1e-11), (torch.float32, 1e-8, 1e-2)):
        one, other = parity.run_adamw(golden, dtype), parity.run_adamw(golden, dtype, random)
        assert torch.equal(one.masks, other.masks)
        assert least < ((one.history - other.history) / one.history).abs().max() < most
        assert least < (one.after.features - other.after.features).abs().max() < most


def test_a_nan_and_a_wrong_shape_are_caught(computed: Computed) -> None:
    arrays, quantities, inputs = computed
    nan = arrays["clean/features"].copy()
    nan[0, 0] = np.nan
    wrong = {"clean/features": nan, "cam/mmcam": arrays["cam/mmcam"][:, 1:], "mask/margin": arrays["mask/margin"] > 1}
    assert failures({**arrays, **wrong}, quantities, inputs) == wrong.keys()


@pytest.mark.parametrize(
    ("name", "caught"),
    [
        ("images_u8", "clean/features"),
        ("labels", "loss/ce_clean"),
        ("student/backbone.transformer.resblocks.1.attn.in_proj_weight", "f64/features"),
        ("teacher/backbone.proj", "clean/teacher_features"),
        ("fill/ObjMaskMultiFill/seed", "fill/ObjMaskMultiFill/idx_shift"),
        ("nofill/RandMaskNoFill/seed", "nofill/RandMaskNoFill/token_idx"),
        ("mask/thresholds", "mask/margin"),
        ("adamw/probe_idx", "adamw/probe"),
        ("adamw/hparams", "f64/adamw/norm_all_no_kbias"),
    ],
)
def test_a_wrong_input_is_caught_where_it_is_used(name: str, caught: str) -> None:
    arrays = read_arrays(GOLDEN / "tiny-seed0.npz")
    wrong = arrays[name].copy()
    flat = wrong.reshape(-1)
    flat[0] = (flat[0] + 1) % 7 if wrong.dtype.kind in "iu" else flat[0] * 1.01 + 1e-4
    arrays[name] = wrong
    assert caught in failures(arrays, *parity.compute(arrays))


def test_an_unknown_and_a_missing_array_are_failures(computed: Computed) -> None:
    arrays, quantities, inputs = computed
    extra = {"student/backbone.extra", "step/fd/surprise"}
    more = {**arrays, **dict.fromkeys(extra, np.zeros(1))}
    assert failures(more, quantities, inputs) == extra
    fewer = {name: value for name, value in arrays.items() if name != "cam/mmcam"}
    assert failures(fewer, quantities, inputs) == {"cam/mmcam"}
    gradients = read_arrays(GOLDEN / "tiny-seed0-grads-a.npz")
    del gradients["grad/fd/classifier.bias"]
    assert failures(gradients, quantities, inputs) == {"grad/fd/classifier.bias"}


def test_the_command_reports_a_failure_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = read_arrays(GOLDEN / "tiny-seed0.npz")
    arrays["step/kd/loss"] = arrays["step/kd/loss"] * np.float32(1.001)
    np.savez(tmp_path / "bad.npz", **arrays)  # type: ignore[arg-type]  # numpy types no keyword but allow_pickle
    assert parity.main([str(tmp_path / "bad.npz")]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line and not line.startswith(" ")]
    assert line.startswith("step/kd/loss ")


def test_what_cannot_be_read_ends_in_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "garbage.npz").write_bytes(b"PK not a zip")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "lonely-grads-a.npz").write_bytes((GOLDEN / "tiny-seed0-grads-a.npz").read_bytes())
    for name in ("absent.npz", "garbage.npz", "other.npz", "lonely-grads-a.npz"):
        assert parity.main([str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert error.startswith("parity: ")
    assert parity.main([]) == 2
