"""What a run keeps of each image: the teacher's map is computed once, rounded from the first visit on, and found again."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cammask_fast import api
from cammask_fast.cam import mm_cam, relevance_of
from cammask_fast.checkpoint import Checkpoints
from cammask_fast.checkpoint.training import read_checkpoint
from cammask_fast.cli import main
from cammask_fast.config import OptimConfig, TrainConfig
from cammask_fast.data.iterables import IterableLoader
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.types import ArrayLoader
from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.masking import kept
from cammask_fast.masking.kept import SampleStore, TeacherMemory, teacher_relevance
from cammask_fast.model.vit import Taps
from cammask_fast.runtime.run_dir import refuse_changes
from cammask_fast.runtime.signals import TrainingPreempted
from cammask_fast.state import TrainState
from cammask_fast.step import build_step, build_strategy, build_train_step, sample_step_randomness
from cammask_fast.train import FineTuned, Run, fine_tune
from tests.helpers.processes import logged, photo_folder, run
from tests.test_compiled_step import LEAVES_THE_DEVICE, Graphs, furthest
from tests.test_step import CONFIGS, TINY, batch, classifier, draws_for, pair, written_out, wrong_gradients

TEACHER = replace(CONFIGS["masked-object"], cam_source="teacher")
SHORT = replace(TEACHER, epochs=4, batch_size=4, optim=OptimConfig(lr=1e-2))
IMAGES = 14
"""Of which each epoch drops two others."""
VARIANTS = {
    "object": TEACHER,
    "grad-cam": replace(TEACHER, cam="grad-cam"),
    "late-layers": replace(TEACHER, cam_start_layer=1),
    "context": replace(TEACHER, method="masked-context"),
    "topk": replace(TEACHER, method="masked-topk"),
    "bilinear": replace(TEACHER, upsample="bilinear"),
    "kd": replace(TEACHER, method="ft-kd", masking="ObjMaskSingleFill(0.3)"),
}


def loader(*, seed: int = 0) -> ArrayLoader:
    data = batch(IMAGES)
    return ArrayLoader(data.images, data.labels, ResumableDistributedSampler(IMAGES, batch_size=4, shuffle=True, seed=seed))


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images per call of `teacher_relevance`."""
    seen: list[int] = []

    def counted(teacher: object, images: Tensor, labels: Tensor, config: TrainConfig) -> Tensor:
        seen.append(len(images))
        return teacher_relevance(teacher, images, labels, config)  # type: ignore[arg-type]

    monkeypatch.setattr(kept, "teacher_relevance", counted)
    return seen


@pytest.mark.parametrize("name", VARIANTS)
def test_the_kept_map_is_the_teachers(name: str) -> None:
    """In float64 without the store, against float32 rounded to float16 with it."""
    config, data, teacher = VARIANTS[name], batch(6), classifier(dtype=torch.float32).frozen_copy()
    memory = TeacherMemory(teacher, config, 10)
    shuffled = data._replace(sample_ids=torch.tensor([7, 2, 9, 0, 4, 5]))
    found = memory.add_to(shuffled, torch.device("cpu"))
    gold_model, taps = classifier(), Taps()
    if config.cam == "mm-cam":
        logits = gold_model(normalise(data.images, dtype=torch.float64), taps=taps).logits
        gold = mm_cam(logits, data.labels, taps, start_layer=config.cam_start_layer).detach()
    else:
        gold = relevance_of(gold_model, data.images, data.labels, "grad-cam", dtype=torch.float64)
    assert found.relevance is not None
    assert found.relevance.dtype == torch.float16
    assert found.relevance.shape == (6, TINY.patches)
    assert (found.relevance.double() - normalise_relevance(gold)).abs().max() <= 2**-11 + 1e-5
    assert found.relevance.amax(1).tolist() == pytest.approx([1.0 if row.any() else 0.0 for row in gold])
    assert all(torch.equal(x, y) for x, y in zip(found.tensors(), shuffled.tensors(), strict=False))


def test_a_map_is_computed_once_and_found_by_its_id(visits: list[int]) -> None:
    data, memory = batch(6), TeacherMemory(classifier(dtype=torch.float32).frozen_copy(), replace(TEACHER, batch_size=4), 6)
    first = memory.add_to(data.map(lambda tensor: tensor[:3]), torch.device("cpu"))
    order = torch.tensor([5, 1, 3, 0, 4, 2])
    second = memory.add_to(data.map(lambda tensor: tensor[order]), torch.device("cpu"))
    third = memory.add_to(data, torch.device("cpu"))
    assert visits == [3, 3], "of the second batch the three that are new"
    assert first.relevance is not None
    assert second.relevance is not None
    assert third.relevance is not None
    assert torch.equal(first.relevance, third.relevance[:3])
    assert torch.equal(second.relevance, third.relevance[order])
    assert len({tuple(row) for row in third.relevance.tolist()}) == 6
    memory.add_to(data._replace(sample_ids=torch.arange(6)), torch.device("cpu"))
    assert visits == [3, 3]


def test_maps_are_computed_a_micro_batch_at_a_time(visits: list[int]) -> None:
    memory = TeacherMemory(classifier(dtype=torch.float32).frozen_copy(), replace(TEACHER, batch_size=4, accumulate=2), 5)
    memory.add_to(batch(5), torch.device("cpu"))
    assert visits == [2, 2, 1]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_step_masks_by_the_kept_map(name: str) -> None:
    config, (student, teacher) = VARIANTS[name], pair()
    data = batch()._replace(relevance=teacher_relevance(teacher, batch().images, batch().labels, config))
    draws = draws_for(config, data)
    loss = written_out(student, teacher, config, data, draws)
    names, parameters = zip(*student.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    losses = build_step(student, teacher, config)(data, draws)
    assert losses.total.item() == pytest.approx(loss.item(), rel=1e-12)
    assert wrong_gradients(student, expected) == {}
    assert losses.cam_entropy.isfinite()
    own = build_step(student, teacher, replace(config, cam_source="student"))(data, draws)
    assert own.cam_entropy != losses.cam_entropy, "the student, which has moved, sees something else"


def test_a_step_without_a_map_says_who_gives_it() -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match="carries no relevance; let TeacherMemory add it"):
        build_step(student, teacher, TEACHER)(batch(), draws_for(TEACHER, batch()))


def test_a_map_that_is_not_finite_reaches_the_loss() -> None:
    student, teacher = pair()
    data = batch()._replace(relevance=torch.full((4, TINY.patches), torch.nan, dtype=torch.float16))
    assert build_step(student, teacher, TEACHER)(data, draws_for(TEACHER, data)).total.isnan()


class Stop:
    """Asks for a stop after a number of steps, once."""

    def __init__(self, after: int):
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def trained(config: TrainConfig, folder: Path | None = None, *, stops: tuple[int, ...] = ()) -> FineTuned:
    """A run that is stopped after so many steps each time, and goes on from its checkpoint."""
    if folder is None:
        return fine_tune(classifier(dtype=torch.float32), loader(), None, config)
    for after in (*stops, 0):
        checkpoints = Checkpoints(folder, {}, warn=print)
        run = Run(checkpoints=checkpoints, save_every=100, stop=Stop(after))
        try:
            return fine_tune(classifier(dtype=torch.float32), loader(), None, config, run=run)
        except TrainingPreempted:
            pass
        finally:
            run.finish()
    raise AssertionError("stopped once too often")


def flat(tuned: FineTuned) -> Tensor:
    return torch.nn.utils.parameters_to_vector(tuned.last.parameters()).detach()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path: Path, visits: list[int], accumulate: int) -> None:
    """Stopped in the middle of the first epoch, in the second, and in the last."""
    config = replace(SHORT, accumulate=accumulate)
    whole = trained(config)
    assert sum(visits) == IMAGES, "one map per image"
    visits.clear()
    assert torch.equal(flat(whole), flat(trained(config, tmp_path, stops=(2, 3, 5))))
    assert sum(visits) == IMAGES, "kept over the stops"
    assert not torch.equal(flat(whole), flat(trained(replace(config, cam_source="student"))))


def test_a_checkpoint_without_maps_is_resumed_and_of_other_images_refused(tmp_path: Path, visits: list[int]) -> None:
    trained_to = Run(checkpoints=Checkpoints(tmp_path, {}, warn=print), save_every=100, stop=Stop(4))
    with pytest.raises(TrainingPreempted):
        fine_tune(classifier(dtype=torch.float32), loader(), None, SHORT, run=trained_to)
    trained_to.finish()
    saved = trained_to.checkpoints.newest()  # type: ignore[union-attr]
    assert saved is not None
    rows, known = (saved.saved.tensors[f"kept.relevance.{name}"] for name in ("rows", "known"))
    assert rows.dtype == torch.float16
    assert known.sum() == sum(visits) == 12
    store = SampleStore(IMAGES + 1, TINY.patches, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"kept rows: expected \(15, 16\), got \(14, 16\)"):
        store.load_state_dict({"rows": rows, "known": known})
    memory = TeacherMemory(classifier(dtype=torch.float32).frozen_copy(), SHORT, IMAGES)
    memory.load_state_dict({})
    assert not memory.relevance.known.any()


def test_maps_of_images_that_have_changed_are_not_used(tmp_path: Path, visits: list[int]) -> None:
    """A run may go on with other images of the same classes, and says so; their maps are made anew."""
    for images, stop, computed in (("a", 9, IMAGES), ("b", 0, IMAGES)):
        visits.clear()
        settings = {"images": images}
        run = Run(checkpoints=Checkpoints(tmp_path, settings, warn=print), save_every=100, stop=Stop(stop), settings=settings)
        with pytest.raises(TrainingPreempted) if stop else nullcontext():
            fine_tune(classifier(dtype=torch.float32), loader(), None, SHORT, run=run)
        run.finish()
        assert sum(visits) <= computed
    assert sum(visits) > 4, "the step to resume at is the tenth of twelve"


def test_a_run_of_before_is_the_students() -> None:
    old = {"seed": 0}
    refuse_changes(old, {"seed": 0, "cam_source": "student"}, Path("run"))
    with pytest.raises(ValueError, match="cam_source teacher instead of student"):
        refuse_changes(old, {"seed": 0, "cam_source": "teacher"}, Path("run"))


@pytest.mark.parametrize("words", [["flip"], ["random-crop=0.5"], ["rand-augment=1,5"], ["color-jitter=0.2", "flip"]])
def test_images_that_move_under_their_maps_are_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--cam-source", "teacher", "--augment", *words]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "--cam-source teacher keeps one map per image" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--method", "ft"], ["--method", "ft-fd"], ["--masking", "RandMaskNoFill(0.75)"]])
def test_methods_without_maps_are_refused(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--cam-source", "teacher", *options]
    assert main(argv) == 2
    assert "needs no map: leave it out" in capsys.readouterr().err


def test_images_without_ids_that_stay_are_refused() -> None:
    data = batch(4)
    batches = IterableLoader([(data.images, data.labels)], image_size=12)
    with pytest.raises(ValueError, match="batches of an iterable have none that stay"):
        TeacherMemory.of_run(classifier(), TEACHER, batches)
    assert TeacherMemory.of_run(classifier(), CONFIGS["ft"], batches) is None


def test_a_loop_of_ones_own_has_the_teachers_map() -> None:
    student, teacher = pair()
    single, frozen = student.float(), teacher.float()
    data = batch()
    step = api.train_step(single, frozen, seed=3, cam_source="teacher", w_distill=3.0)
    losses = step(data.images, data.labels)
    with_map = data._replace(relevance=teacher_relevance(frozen, data.images, data.labels, TEACHER))
    config = TrainConfig(cam_source="teacher", w_distill=3.0, seed=3)
    single.zero_grad()
    draws = sample_step_randomness(build_strategy(config), data, TINY.patches, torch.Generator().manual_seed(3))
    assert build_step(single, frozen, config)(with_map, draws).total == losses.total


def test_the_host_never_waits_for_the_device() -> None:
    """On shapes alone, where nothing can be read back."""
    meta = torch.device("meta")
    memory = TeacherMemory(classifier(dtype=torch.float32).frozen_copy().to(meta), TEACHER, 6)
    for chosen in ([0, 1, 2], [1, 2, 3, 4], [4, 0, 2]):
        found = memory.add_to(batch(6).map(lambda tensor: tensor[chosen]), meta)  # noqa: B023
        assert {tensor.device for tensor in found.tensors()} == {meta}
    assert memory.relevance.known.tolist() == [True] * 5 + [False]


def steps(config: TrainConfig, *, compiled: bool) -> tuple[TrainState, Graphs]:
    """Five steps over changing batches with what is kept of them."""
    torch._dynamo.reset()
    config = replace(config, optim=OptimConfig(lr=1e-3), epochs=1)
    student, teacher = pair()
    state, graphs = TrainState.create(student, config, steps_per_epoch=5, compiled=compiled), Graphs()
    step, memory = build_train_step(state, teacher, config, backend=graphs.backend), TeacherMemory(teacher, config, 8)
    for number in range(5):
        data = memory.add_to(batch(8).map(lambda tensor: tensor.roll(number, 0)), torch.device("cpu"))  # noqa: B023
        step([(data, sample_step_randomness(build_strategy(config), data, TINY.patches, state.generator))])
    return state, graphs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["topk"])
def test_one_graph_over_kept_maps_is_the_eager_run(name: str) -> None:
    eager, _ = steps(VARIANTS[name], compiled=False)
    state, graphs = steps(VARIANTS[name], compiled=True)
    (graph,) = graphs
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if any(f".{bad}" in f".{target}" for bad in LEAVES_THE_DEVICE)]
    assert not [target for target in targets if "cls_relevance" in target], "the step computes no map"
    worst, error = furthest(state.student, eager.student)
    assert error < 1e-11, worst
    assert furthest(state.student, pair()[0])[1] > 1e-4, "the parameters must have moved"


@pytest.mark.slow
def test_processes_share_what_they_keep(tmp_path: Path) -> None:
    """The same losses on one and on two, over two epochs: in the second, half of the maps are another process's."""
    photos, outs = photo_folder(tmp_path), [tmp_path / name for name in ("one", "two")]
    options = (
        "--epochs", 3, "--batch-size", 18, "--lr", "1e-5", "--log-every", 1, "--loader", "torch", "--workers", 0,
        "--donors", "global", "--cam-source", "teacher", "--masking", "ObjMaskNoFill(top=50%)", "--keep", 9,
    )  # fmt: skip
    assert main([str(word) for word in ("train", "--data", photos, "--out", outs[0], *options)]) == 0
    done = run(["train", "--data", photos, "--out", outs[1], *options], ranks=2)
    assert done.returncode == 0, done.stderr
    ours, theirs = logged(outs[1]), logged(outs[0])
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=2e-4)
    for out in outs:
        first = read_checkpoint(out / "checkpoints" / "step-00000003").saved.tensors
        last = read_checkpoint(out / "checkpoints" / "step-00000009").saved.tensors
        assert first["kept.relevance.known"].all(), "after an epoch of 54 images, those of both processes"
        assert first["kept.relevance.rows"].amax(1).eq(1).all()
        assert torch.equal(first["kept.relevance.rows"], last["kept.relevance.rows"])
