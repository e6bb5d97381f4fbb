"""The zero-shot head: equal to open_clip's, cut where nothing is lost, kept between commands, made by rank 0 alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor

from cammask_fast.cli import main
from cammask_fast.commands import shared
from cammask_fast.data.datasets.texture_digits import TEMPLATES as TINYS_TEMPLATES
from cammask_fast.model import head_cache, pretrained, zero_shot
from cammask_fast.model.head_cache import TenthsOf, head_key, kept_head, shipped_head_key
from cammask_fast.model.pretrained import PretrainedClip, load_pretrained
from cammask_fast.model.zero_shot import encode_texts, load_tiny_tower, zero_shot_weights
from tests.test_folder import make_folder

NAMES = ["cat", "a much longer name of a class that has many words in it", "dog"]
TEMPLATES = ["{}", "a photo of a {}.", "an origami {} on the moon, seen by night through a telescope of brass."]


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()


@pytest.fixture(scope="module")
def tokenize() -> Callable[[list[str]], Tensor]:
    return open_clip.SimpleTokenizer(context_length=40)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("CAMMASK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zero-shot-heads"


@pytest.mark.parametrize("budget", [1, 30, 4096])
@pytest.mark.parametrize("block", [2, 8192])
def test_the_head_is_open_clips(
    clip: CLIP, tokenize: Callable[[list[str]], Tensor], budget: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is sorted, cut and batched."""
    theirs = open_clip.build_zero_shot_classifier(clip, tokenize, NAMES, [t.format for t in TEMPLATES]).T
    monkeypatch.setattr(zero_shot, "TOKENS_OF_A_BATCH", {"cpu": budget})
    monkeypatch.setattr(zero_shot, "PROMPTS_IN_MEMORY", block)
    seen: list[tuple[int, int]] = []
    visual = clip.visual
    ours = zero_shot_weights(clip, tokenize, NAMES, TEMPLATES, progress=lambda done, total: seen.append((done, total)))
    torch.testing.assert_close(ours, theirs * clip.logit_scale.exp().detach(), rtol=0, atol=2e-5)
    assert seen[-1] == (9, 9)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert clip.visual is visual, "put back"


def test_texts_are_cut_behind_the_longest_of_a_batch(
    clip: CLIP, tokenize: Callable[[list[str]], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[tuple[int, int]] = []
    real = zero_shot._encode

    def encode(clip: CLIP, tokens: Tensor) -> Tensor:
        lengths.append((tokens.shape[0], tokens.shape[1]))
        return real(clip, tokens)

    monkeypatch.setattr(zero_shot, "_encode", encode)
    monkeypatch.setattr(zero_shot, "TOKENS_OF_A_BATCH", {"cpu": 12})
    tokens = tokenize(["a cat", "a dog", "a photo of a very small black cat", "cat"])
    whole = torch.nn.functional.normalize(clip.encode_text(tokens), dim=-1)
    torch.testing.assert_close(encode_texts(clip, tokens), whole, rtol=0, atol=1e-6)
    assert lengths == [(3, 4), (1, 10)]


@pytest.mark.parametrize("kind", ["no mask", "other mask", "other pool"])
def test_other_text_towers_are_not_cut(
    clip: CLIP, tokenize: Callable[[list[str]], Tensor], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "other pool":
        monkeypatch.setattr(clip, "text_pool_type", "last")
    else:
        wide = torch.full((40, 40), -torch.inf).triu(2) if kind == "other mask" else None
        monkeypatch.setitem(clip._buffers, "attn_mask", wide)
    tokens = tokenize(["a cat", "a photo of a dog"])
    whole = torch.nn.functional.normalize(clip.encode_text(tokens), dim=-1)
    torch.testing.assert_close(encode_texts(clip, tokens), whole, rtol=0, atol=1e-6)


def test_heads_of_many_prompts_are_kept(
    clip: CLIP, tokenize: Callable[[list[str]], Tensor], cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    both = PretrainedClip(visual=load_tiny_tower()[0], load=lambda: (clip, tokenize), templates=tuple(TEMPLATES))
    first = both.head(NAMES)
    assert not cache.exists(), "few prompts"
    assert not capsys.readouterr().err
    monkeypatch.setattr(pretrained, "MANY_PROMPTS", 9)
    made = both.head(NAMES)
    assert "zero-shot head: 9 of 9 prompts" in capsys.readouterr().err
    assert torch.equal(made, first)
    monkeypatch.setattr(pretrained, "zero_shot_weights", lambda *_a, **_o: pytest.fail("made again"))
    assert torch.equal(both.head(NAMES), first)
    assert "read from" in capsys.readouterr().err
    (path,) = cache.iterdir()
    for content in (b"junk", path.read_bytes()[:-40]):
        path.write_bytes(content)
        assert torch.equal(kept_head(path.stem, lambda: first + 1), first + 1), "a damaged file is made again"
        assert torch.equal(kept_head(path.stem, lambda: first), first + 1)
    assert [one.name for one in cache.iterdir()] == [path.name], "nothing left over"


def test_a_head_belongs_to_all_that_it_is_made_of(clip: CLIP, tokenize: Callable[[list[str]], Tensor]) -> None:
    keys = [
        head_key(clip, tokenize, NAMES, TEMPLATES),
        head_key(clip, tokenize, NAMES[::-1], TEMPLATES),
        head_key(clip, tokenize, NAMES, TEMPLATES[:2]),
        head_key(clip, open_clip.SimpleTokenizer(context_length=39), NAMES, TEMPLATES),
    ]
    for name in ("token_embedding.weight", "logit_scale", "text_projection"):
        with torch.no_grad():
            value = clip.get_parameter(name)
            before = value.clone()
            value.add_(1e-3)
            keys.append(head_key(clip, tokenize, NAMES, TEMPLATES))
            value.copy_(before)
    assert len(set(keys)) == 7
    with torch.no_grad():
        clip.get_parameter("visual.proj").add_(1)
    assert head_key(clip, tokenize, NAMES, TEMPLATES) == keys[0], "the image tower has no part in it"


def test_a_cache_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = torch.ones(2, 3)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAMMASK_CACHE", str(tmp_path / "file"))
    assert kept_head("k", lambda: head) is head
    assert "cannot be kept in" in capsys.readouterr().err
    monkeypatch.setenv("CAMMASK_CACHE", str(tmp_path / "full"))

    def full(_tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(head_cache, "save_file", full)
    assert kept_head("k", lambda: head) is head
    assert "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "full" / "zero-shot-heads").iterdir())
    monkeypatch.setenv("CAMMASK_CACHE", "")
    assert kept_head("k", lambda: head) is head
    assert not capsys.readouterr().err


def test_progress_is_a_line_per_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TenthsOf("x")
    for done in range(5, 101, 5):
        progress(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[2]) for line in lines] == [5, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def test_another_rank_waits_for_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(1, 64)
    monkeypatch.setattr(shared, "rank", lambda: 1)
    monkeypatch.setattr(shared, "is_initialized", lambda: True)
    monkeypatch.setattr(shared, "broadcast_state", lambda own: own or shared.SharedHead({"weight": weight}, {}))
    monkeypatch.setattr(PretrainedClip, "head", lambda *_a, **_o: pytest.fail("made twice"))
    assert torch.equal(shared.zero_shot_model("tiny", "", ["one"], None, "cpu").head.weight, weight)
    monkeypatch.setattr(shared, "is_initialized", lambda: False)
    with pytest.raises(pytest.fail.Exception, match="made twice"):
        shared.zero_shot_model("tiny", "", ["one"], None, "cpu")


def test_a_restart_reads_the_head(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_folder(tmp_path / "data", {"dog": 4, "red_fox": 4})
    (tmp_path / "t.txt").write_text("".join(f"{number} {{}}\n" for number in range(250)))
    argv = ["zeroshot", "--data", data, "--templates", tmp_path / "t.txt", "--loader", "torch", "--workers", "0", "--json"]
    found = []
    for said in ("zero-shot head: 500 of 500 prompts", "read from"):
        assert main([str(word) for word in argv]) == 0
        printed = capsys.readouterr()
        assert printed.err.count(said) == printed.err.count("zero-shot head:") == 1
        found.append(json.loads(printed.out)["sets"])
    assert found[0] == found[1]
    assert len(list(cache.iterdir())) == 1


def test_the_shipped_model_does_without_its_text_tower_where_its_head_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = load_pretrained("tiny").head(["one", "two"])
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(pretrained, "load_tiny_clip", lambda: pytest.fail("read"))
    assert torch.equal(load_pretrained("tiny").head(["one", "two"]), made)
    for names, templates in ((["two", "one"], ()), (["one", "two"], ["{}"])):
        with pytest.raises(pytest.fail.Exception, match="read"):
            load_pretrained("tiny").head(names, templates)
    (kept,) = cache.iterdir()
    assert kept.stem != shipped_head_key("others", ["one", "two"], TINYS_TEMPLATES)
    assert kept.stem == shipped_head_key(load_tiny_tower()[1], ["one", "two"], TINYS_TEMPLATES)
    assert not capsys.readouterr().err


def test_the_shipped_image_tower_alone() -> None:
    tower, whole = load_tiny_tower()[0], load_pretrained("tiny").clip.visual
    assert not tower.training
    torch.testing.assert_close(tower.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_small_head_that_cannot_be_kept_costs_no_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAMMASK_CACHE", str(tmp_path / "file"))
    assert load_pretrained("tiny").head(["one"]).shape == (1, 64)
    assert not capsys.readouterr().err


def test_the_tiny_model_on_its_own_templates() -> None:
    both = load_pretrained("tiny")
    theirs = open_clip.build_zero_shot_classifier(both.clip, both.tokenize, ["two", "one"], [t.format for t in both.templates])
    expected = theirs.T * both.clip.logit_scale.exp().detach()
    torch.testing.assert_close(both.classifier(["two", "one"]).head.weight.detach(), expected, rtol=0, atol=2e-5)
