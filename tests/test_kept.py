"""What a run keeps of each image: maps and outputs of the teacher are computed once, rounded from the first visit on, and found
again."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cammask_fast import api
from cammask_fast.cam import mm_cam, relevance_of
from cammask_fast.checkpoint import Checkpoints
from cammask_fast.checkpoint.training import read_checkpoint
from cammask_fast.cli import main
from cammask_fast.config import OptimConfig, TrainConfig
from cammask_fast.data.augment import Augment
from cammask_fast.data.iterables import IterableLoader
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.types import ArrayLoader
from cammask_fast.kernels.normalise import normalise
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.masking import kept
from cammask_fast.masking.kept import ImageMemory, SampleStore, kept_relevance, refuse_moving_pixels
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import Taps
from cammask_fast.runtime.run_dir import refuse_changes
from cammask_fast.runtime.signals import TrainingPreempted
from cammask_fast.state import TrainState
from cammask_fast.step import build_step, build_strategy, build_train_step, sample_step_randomness
from cammask_fast.train import FineTuned, Run, fine_tune
from tests.helpers.processes import logged, photo_folder, run
from tests.test_compiled_step import LEAVES_THE_DEVICE, Graphs, furthest
from tests.test_step import CONFIGS, FD, TINY, batch, classifier, draws_for, pair, written_out, wrong_gradients

TEACHER = replace(CONFIGS["masked-object"], cam_source="teacher")
SHORT = replace(TEACHER, epochs=4, batch_size=4, optim=OptimConfig(lr=1e-2))
NO_FILL = replace(TEACHER, masking="ObjMaskNoFill(top=50%)", teacher_outputs="kept")
CPU = torch.device("cpu")
IMAGES = 14
"""Of which each epoch drops two others."""
VARIANTS = {
    "object": TEACHER,
    "grad-cam": replace(TEACHER, cam="grad-cam"),
    "late-layers": replace(TEACHER, cam_start_layer=1),
    "legrad": replace(TEACHER, cam="legrad", cam_start_layer=1, cam_contrast="runner-up"),
    "context": replace(TEACHER, method="masked-context"),
    "topk": replace(TEACHER, method="masked-topk"),
    "bilinear": replace(TEACHER, upsample="bilinear"),
    "kd": replace(TEACHER, method="ft-kd", masking="ObjMaskSingleFill(0.3)"),
}


def loader(*, seed: int = 0) -> ArrayLoader:
    data = batch(IMAGES)
    return ArrayLoader(data.images, data.labels, ResumableDistributedSampler(IMAGES, batch_size=4, shuffle=True, seed=seed))


def memory_of(config: TrainConfig, count: int, teacher: Classifier | None = None) -> ImageMemory:
    """Of a float32 model that is its own student."""
    model = classifier(dtype=torch.float32).frozen_copy() if teacher is None else teacher
    return ImageMemory(model, model, config, count)


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images per call of `kept_relevance`."""
    seen: list[int] = []

    def counted(teacher: object, images: Tensor, labels: Tensor, config: TrainConfig) -> Tensor:
        seen.append(len(images))
        return kept_relevance(teacher, images, labels, config)  # type: ignore[arg-type]

    monkeypatch.setattr(kept, "kept_relevance", counted)
    return seen


@pytest.mark.parametrize("name", VARIANTS)
def test_the_kept_map_is_the_teachers(name: str) -> None:
    """In float64 without the store, against float32 rounded to float16 with it."""
    config, data = VARIANTS[name], batch(6)
    memory = memory_of(config, 10)
    shuffled = data._replace(sample_ids=torch.tensor([7, 2, 9, 0, 4, 5]))
    found = memory.add_to(shuffled, CPU, epoch=0)
    gold_model, taps = classifier(), Taps()
    if config.cam == "mm-cam":
        logits = gold_model(normalise(data.images, dtype=torch.float64), taps=taps).logits
        gold = mm_cam(logits, data.labels, taps, start_layer=config.cam_start_layer).detach()
    else:
        start, contrast, kind = config.cam_start_layer, config.cam_contrast, torch.float64
        gold = relevance_of(gold_model, *data[:2], config.cam, start_layer=start, contrast=contrast, dtype=kind)
    assert found.relevance is not None
    assert found.relevance.dtype == torch.float16
    assert found.relevance.shape == (6, TINY.patches)
    assert (found.relevance.double() - normalise_relevance(gold)).abs().max() <= 2**-11 + 1e-5
    assert found.relevance.amax(1).tolist() == pytest.approx([1.0 if row.any() else 0.0 for row in gold])
    assert all(torch.equal(x, y) for x, y in zip(found.tensors(), shuffled.tensors(), strict=False))


def test_a_map_is_computed_once_and_found_by_its_id(visits: list[int]) -> None:
    data, memory = batch(6), memory_of(replace(TEACHER, batch_size=4), 6)
    first = memory.add_to(data.map(lambda tensor: tensor[:3]), CPU, epoch=0)
    order = torch.tensor([5, 1, 3, 0, 4, 2])
    second = memory.add_to(data.map(lambda tensor: tensor[order]), CPU, epoch=0)
    third = memory.add_to(data, CPU, epoch=0)
    assert visits == [3, 3], "of the second batch the three that are new"
    assert first.relevance is not None
    assert second.relevance is not None
    assert third.relevance is not None
    assert torch.equal(first.relevance, third.relevance[:3])
    assert torch.equal(second.relevance, third.relevance[order])
    assert len({tuple(row) for row in third.relevance.tolist()}) == 6
    memory.add_to(data._replace(sample_ids=torch.arange(6)), CPU, epoch=0)
    assert visits == [3, 3]


def test_maps_are_computed_a_micro_batch_at_a_time(visits: list[int]) -> None:
    memory = memory_of(replace(TEACHER, batch_size=4, accumulate=2), 5)
    memory.add_to(batch(5), CPU, epoch=0)
    assert visits == [2, 2, 1]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_step_masks_by_the_kept_map(name: str) -> None:
    config, (student, teacher) = VARIANTS[name], pair()
    data = batch()._replace(relevance=kept_relevance(teacher, batch().images, batch().labels, config))
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
    with pytest.raises(ValueError, match="carries no relevance, and the run keeps it: let ImageMemory add it"):
        build_step(student, teacher, TEACHER)(batch(), draws_for(TEACHER, batch()))
    config = replace(FD, teacher_outputs="kept")
    with pytest.raises(ValueError, match="carries no outputs of the teacher"):
        build_step(student, teacher, config)(batch(), None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"masking": "CtxMaskNoFill(0.6)"},
        {"method": "ft-kd", "masking": "ObjMaskNoFill(0.3)"},
        {"method": "ft-fd", "masking": "none", "cam_source": "student"},
        {"method": "ft-kd", "masking": "none", "cam_source": "student"},
    ],
)
def test_kept_outputs_of_the_teacher_are_those_of_the_step(changes: dict[str, Any]) -> None:
    """Up to their rounding to float16, which the whole batch shares."""
    config, (student, teacher) = replace(NO_FILL, **changes), pair()
    memory = memory_of(config, 4, teacher)
    data = memory.add_to(batch(), CPU, epoch=0)
    assert data.teacher_outputs is not None
    assert data.teacher_outputs.dtype == torch.float16
    draws = draws_for(config, data)
    computed = build_step(student, teacher, replace(config, teacher_outputs="computed"))(data, draws)
    expected = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    found = build_step(student, teacher, config)(data, draws)
    assert found.task == computed.task
    assert found.distill.item() == pytest.approx(computed.distill.item(), rel=5e-3)
    assert wrong_gradients(student, expected, tolerance=1e-2) == {}
    other = build_step(student, teacher, config)(data._replace(teacher_outputs=data.teacher_outputs.roll(1, 0)), draws)
    assert abs(other.distill / found.distill - 1) > 0.1, "each image has its own"
    memory.teacher = student  # what was kept is not computed again
    again = memory.add_to(batch(), CPU, epoch=3).teacher_outputs
    assert again is not None
    assert torch.equal(again, data.teacher_outputs)


def test_the_students_maps_are_made_anew_every_few_epochs(visits: list[int]) -> None:
    """With the weights that it has then; an image that an epoch dropped is mapped at its next visit."""
    student, teacher = (model.float() for model in pair())
    config = replace(TEACHER, cam_source="student", cam_every=2)
    memory, data = ImageMemory(teacher, student, config, 5), batch(5)
    dropped = data.map(lambda tensor: tensor[:4])
    maps = []
    for epoch, seen in ((0, dropped), (1, data), (2, data), (3, data), (4, dropped), (5, data)):
        found = memory.add_to(seen, CPU, epoch=epoch).relevance
        assert found is not None
        maps.append(found)
        with torch.no_grad():
            student.visual.conv1.weight.add_(0.3 * torch.randn_like(student.visual.conv1.weight))
    assert visits == [4, 1, 5, 4, 1]
    assert torch.equal(maps[0], maps[1][:4])
    assert torch.equal(maps[2], maps[3])
    assert torch.equal(maps[4], maps[5][:4])
    assert not torch.equal(maps[1], maps[2])
    assert not torch.equal(maps[3][:4], maps[4])


def test_a_run_that_keeps_the_students_maps_differs_from_one_that_does_not() -> None:
    student = replace(SHORT, cam_source="student", epochs=2)
    runs = [flat(trained(config)) for config in (student, replace(student, cam_every=2), replace(SHORT, epochs=2))]
    assert not any(torch.equal(runs[i], runs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


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


@pytest.mark.parametrize(
    ("changes", "maps"),
    [
        ({"accumulate": 2}, IMAGES),
        ({"masking": "ObjMaskNoFill(top=50%)", "teacher_outputs": "kept"}, IMAGES),
        ({"cam_source": "student", "cam_every": 2}, 2 * IMAGES - 1),  # two epochs drop the same image
    ],
)
def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path: Path, visits: list[int], changes: dict[str, Any], maps: int) -> None:
    """Stopped in the middle of the first epoch, in the second, and in the third."""
    config = replace(SHORT, **changes)
    whole = trained(config)
    assert sum(visits) == maps, "one map per image, and period of the student's"
    visits.clear()
    assert torch.equal(flat(whole), flat(trained(config, tmp_path, stops=(2, 3, 3))))
    assert sum(visits) == maps, "kept over the stops"


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
    store = SampleStore(IMAGES + 1, TINY.patches, CPU)
    with pytest.raises(ValueError, match=r"kept rows: expected \(15, 16\), got \(14, 16\)"):
        store.load_state_dict({"rows": rows, "known": known})
    memory = memory_of(SHORT, IMAGES)
    memory.load_state_dict({})
    assert not memory.stores["relevance"].known.any()


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
    refuse_changes(old, {"seed": 0, "cam_source": "student", "cam_every": 1, "teacher_outputs": "computed"}, Path("run"))
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method ft --cam-source teacher", "cam_source teacher: method 'ft' with masking 'none' needs no map: leave it out"),
        ("--method ft-fd --cam-every 2", "cam_every 2: method 'ft-fd' with masking 'none' needs no map: leave it out"),
        ("--masking RandMaskNoFill(0.75) --cam-source teacher", "needs no map: leave it out"),
        ("--cam-source teacher --cam-every 3", "cam_every: the teacher's maps stay as they are"),
        ("--cam-every 0", "cam_every: expected a positive value"),
        ("--method ft --teacher-outputs kept", "method 'ft' distils nothing"),
        ("--method masked-topk --teacher-outputs kept", "maps of the student an image is masked otherwise at every visit"),
        ("--cam-source teacher --teacher-outputs kept", "is masked otherwise at every visit: it needs clean images"),
        ("--masking RandMaskNoFill(0.75) --teacher-outputs kept", "is masked otherwise at every visit"),
        ("--method masked-topk --cam-every 2 --augment flip", "--cam-every keeps one map per image"),
        ("--method ft-fd --teacher-outputs kept --augment color-jitter=0.2", "the teacher sees another image after every"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *options.split()]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_colours_may_change_under_a_map() -> None:
    refuse_moving_pixels(TEACHER, Augment(color_jitter=0.4))


def test_images_without_ids_that_stay_are_refused() -> None:
    data = batch(4)
    batches = IterableLoader([(data.images, data.labels)], image_size=12)
    with pytest.raises(ValueError, match="batches of an iterable have none that stay"):
        ImageMemory.of_run(classifier(), classifier(), TEACHER, batches)
    assert ImageMemory.of_run(classifier(), classifier(), CONFIGS["ft"], batches) is None


def test_a_loop_of_ones_own_has_the_teachers_map() -> None:
    student, teacher = pair()
    single, frozen = student.float(), teacher.float()
    data = batch()
    step = api.train_step(single, frozen, seed=3, cam_source="teacher", w_distill=3.0)
    losses = step(data.images, data.labels)
    with_map = data._replace(relevance=kept_relevance(frozen, data.images, data.labels, TEACHER))
    config = TrainConfig(cam_source="teacher", w_distill=3.0, seed=3)
    single.zero_grad()
    draws = sample_step_randomness(build_strategy(config), data, TINY.patches, torch.Generator().manual_seed(3))
    assert build_step(single, frozen, config)(with_map, draws).total == losses.total
    with pytest.raises(ValueError, match="batches without ids that stay cannot be remembered"):
        api.train_step(single, frozen, method="ft-fd", teacher_outputs="kept")


def test_the_host_never_waits_for_the_device() -> None:
    """On shapes alone, where nothing can be read back."""
    meta = torch.device("meta")
    memory = memory_of(NO_FILL, 6, classifier(dtype=torch.float32).frozen_copy().to(meta))
    for chosen in ([0, 1, 2], [1, 2, 3, 4], [4, 0, 2]):
        found = memory.add_to(batch(6).map(lambda tensor: tensor[chosen]), meta, epoch=0)  # noqa: B023
        assert {tensor.device for tensor in found.tensors()} == {meta}
    assert memory.stores["relevance"].known.tolist() == [True] * 5 + [False]


def steps(config: TrainConfig, *, compiled: bool) -> tuple[TrainState, Graphs]:
    """Five steps over changing batches with what is kept of them."""
    torch._dynamo.reset()
    config = replace(config, optim=OptimConfig(lr=1e-3), epochs=1)
    student, teacher = pair()
    state, graphs = TrainState.create(student, config, steps_per_epoch=5, compiled=compiled), Graphs()
    step, memory = build_train_step(state, teacher, config, backend=graphs.backend), memory_of(config, 8, teacher)
    for number in range(5):
        data = memory.add_to(batch(8).map(lambda tensor: tensor.roll(number, 0)), CPU, epoch=0)  # noqa: B023
        step([(data, sample_step_randomness(build_strategy(config), data, TINY.patches, state.generator))])
    return state, graphs


@pytest.mark.slow
def test_one_graph_over_what_is_kept_is_the_eager_run() -> None:
    eager, _ = steps(NO_FILL, compiled=False)
    state, graphs = steps(NO_FILL, compiled=True)
    (graph,) = graphs
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if any(f".{bad}" in f".{target}" for bad in LEAVES_THE_DEVICE)]
    assert not [target for target in targets if "cls_relevance" in target], "the step computes no map"
    worst, error = furthest(state.student, eager.student)
    assert error < 1e-11, worst
    assert furthest(state.student, pair()[0])[1] > 1e-4, "the parameters must have moved"


@pytest.mark.slow
def test_processes_share_what_they_keep(tmp_path: Path) -> None:
    """The same losses on one and on two: in the second epoch, half of what is kept is another process's."""
    photos, outs = photo_folder(tmp_path), [tmp_path / name for name in ("one", "two")]
    options = (
        "--epochs", 2, "--batch-size", 18, "--lr", "1e-5", "--log-every", 1, "--loader", "torch", "--workers", 0,
        "--donors", "global", "--cam-source", "teacher", "--masking", "ObjMaskNoFill(top=50%)", "--teacher-outputs", "kept",
    )  # fmt: skip
    assert main([str(word) for word in ("train", "--data", photos, "--out", outs[0], *options)]) == 0
    done = run(["train", "--data", photos, "--out", outs[1], *options], ranks=2)
    assert done.returncode == 0, done.stderr
    ours, theirs = logged(outs[1]), logged(outs[0])
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=2e-4)
    one, two = (read_checkpoint(out / "checkpoints" / "step-00000006").saved.tensors for out in outs)
    for name in ("relevance", "teacher_outputs"):
        assert two[f"kept.{name}.known"].all(), "those of both processes"
        rows, alone = two[f"kept.{name}.rows"].float(), one[f"kept.{name}.rows"].float()
        assert (rows - alone).abs().max() <= 2e-3 * alone.abs().max(), "in other batches, but for rounding"
        assert rows.any(1).all()
