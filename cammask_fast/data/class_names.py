"""Names of classes: of folders, in files, in prompts; the one module that reads, matches and checks them."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from cammask_fast.data.text_files import read_lines, read_numbered_lines
from cammask_fast.runtime.notices import notice, remark

PAIRS = "write lines folder<TAB>name"
_ID = re.compile(r"\d+|n\d{8}")  # a number or a WordNet id


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def loose(name: str) -> str:
    """A name without what people do not see in it: case, underscores for spaces, spaces at the ends, forms of Unicode."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split()).casefold()


def twins(names: Iterable[str]) -> list[list[int]]:
    """The indices of names that are equal but for case, underscores and spaces, a list for each of them."""
    indices = defaultdict(list)
    for index, name in enumerate(names):
        indices[loose(name)].append(index)
    return [found for found in indices.values() if len(found) > 1]


def class_list(text: str) -> tuple[str, ...]:
    """`--classes`: a file with a class folder per line, or names separated by commas, with quotes around a name that has one.

    Raises ValueError when the file is missing or cannot be read.
    """
    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):  # too long for a file's name
        is_file = False
    if is_file:
        return tuple(read_lines(Path(text)))
    if "," not in text and (text.endswith((".txt", ".csv", ".tsv", ".lst")) or "/" in text):
        raise ValueError(f"--classes: no file at {text}")
    (names,) = csv.reader([text.replace("\n", " ")], skipinitialspace=True) if text.strip() else ([],)
    return tuple(name.strip() for name in names if name.strip())


def match_names(wanted: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[str]]:
    """For each wanted name the known one that is equal, if need be but for spaces at the ends; and those without any."""
    exact, taken, stripped = set(known), set(wanted), defaultdict(list)
    for name in known:
        if name not in taken:
            stripped[name.strip()].append(name)
    matched, missing, nearly = [], [], []
    for name in wanted:
        found = [name] if name in exact else stripped[name.strip()]
        if len(found) != 1:
            missing.append(name)
            continue
        matched += found
        nearly += [repr(name)] if found != [name] else []
    if nearly:
        remark(f"class names matched but for spaces at their ends: {len(nearly)}, {some(nearly)}")
    return matched, missing


def did_you_mean(missing: Sequence[str], known: Sequence[str]) -> str:
    """Words for an error: known names that differ from missing ones in case, underscores and spaces only."""
    close = {loose(name): name for name in known}
    pairs = [f"{close[loose(name)]!r} for {name!r}" for name in missing if loose(name) in close]
    return f" (did you mean {some(pairs, 3)}?)" if pairs else ""


def read_classes_file(file: Path) -> tuple[str, ...]:
    """`classes.txt`: a class per line in the order of the labels from 0, or lines that begin with these numbers.

    Raises ValueError on a name that stands twice, and see `read_lines`.
    """
    names = _in_order(file)
    numbered = [re.fullmatch(r"(\d+)(?:\s*[:,]\s*|\s+)(\S.*)", name.strip()) for name in names]
    found = {int(one[1]): one[2] for one in numbered if one is not None}
    if len(found) == len(names) > 1 and set(found) == set(range(len(names))):
        notice(f"{file}: the number before each of the {len(names)} names is taken for its label")
        names = [found[label] for label in range(len(names))]
    indices: dict[str, int] = {}
    for index, name in enumerate(names):
        if indices.setdefault(name, index) != index:
            raise ValueError(
                f"{file}: entries {indices[name] + 1} and {index + 1} are both {name!r}: a class per line, each once "
                "(names for prompts may repeat, in --class-names)"
            )
    return tuple(names)


def _in_order(file: Path) -> list[str]:
    """The lines of a file in which their order counts; blank ones in between are a notice."""
    lines = read_numbered_lines(file)
    between = lines[-1][0] - lines[0][0] + 1 - len(lines)
    if between:
        notice(f"{file}: ignored blank lines between the names, which do not count as classes: {between}")
    return [line for _, line in lines]


def read_class_names(file: Path | None, folders: Sequence[str]) -> tuple[str, ...]:
    """One class name per folder, for the prompts.

    Without a file: the folder names, underscores read as spaces. The file has one name per line in the order of the folders,
    or lines `folder<TAB>name` in any order. Names that are the folders' own are matched by name; where all folders are
    numbers, the order is the numeric one. What is matched or guessed, and names that two classes share, are notices. Raises
    ValueError when names and folders do not match, or the order of the folders can be read in two ways.
    """
    if file is None:
        names = [folder.replace("_", " ").strip() for folder in folders]
        if all(_ID.fullmatch(name) for name in names):
            notice(
                f"the classes are only numbers or ids ({some(names, 3)}), which say little in prompts; pass --class-names FILE"
            )
    else:
        names = _named(file, folders)
    tell_twins(folders, names)
    return tuple(names)


def tell_twins(folders: Sequence[str], names: Sequence[str]) -> None:
    """One line for classes whose names are the same in a prompt."""
    found = [" and ".join(repr(folders[index]) for index in group) for group in twins(names)]
    if found:
        notice(
            f"names that stand for more than one class (case, underscores and spaces aside): {some(found, 3)}; prompts "
            "cannot tell them apart: merge the folders, or name them differently with --class-names"
        )


def _named(file: Path, folders: Sequence[str]) -> list[str]:
    numbered = read_numbered_lines(file)
    with_tab = [number for number, line in numbered if "\t" in line.strip()]
    if len(with_tab) == len(numbered):
        return _from_pairs(file, numbered, folders)
    if with_tab:
        without = next(number for number, line in numbered if "\t" not in line.strip())
        raise ValueError(f"{file}: line {with_tab[0]} has a tab and line {without} has none: {PAIRS}, or one name per line")
    names = [line.strip() for line in _in_order(file)]
    if len(names) != len(folders):
        raise ValueError(
            f"{file} has {len(names)} class names for {len(folders)} class folders: write one line per folder, or {PAIRS}"
        )
    own = {loose(name): name for name in names}
    if len(own) == len(folders) and own.keys() == {loose(folder) for folder in folders}:
        matched = [own[loose(folder)] for folder in folders]
        if matched != names:
            notice(f"{file}: its {len(names)} names are those of the folders in another order: matched by name")
        return matched
    return [names[index] for index in _indices_in_list(file, folders)]


def _from_pairs(file: Path, lines: Sequence[tuple[int, str]], folders: Sequence[str]) -> list[str]:
    known, named, seen = set(folders), dict[str, str](), dict[str, int]()
    stripped = {folder.strip(): folder for folder in folders}
    unused = []
    for number, line in lines:
        cuts = [index for index, letter in enumerate(line) if letter == "\t"]
        pairs = [(line[:cut], line[cut + 1 :].strip()) for cut in cuts]  # a folder's name may have tabs, too
        folder, name = next((pair for pair in pairs if pair[0] in known), pairs[0])
        folder = folder if folder in known else stripped.get(folder.strip(), folder)
        if not name:
            raise ValueError(f"{file}, line {number}: no name after the tab")
        if named.setdefault(folder, name) != name:
            raise ValueError(f"{file}: lines {seen[folder]} and {number} give the folder {folder!r} two names")
        seen[folder] = number
        if folder not in known:
            unused.append(folder)
    missing = [folder for folder in folders if folder not in named]
    if missing:
        raise ValueError(f"{file} names no class for the folders {some(missing)}{did_you_mean(missing, unused)}")
    if unused:
        notice(f"{file}: folders in it that are not in the data: {len(unused)}, {some(unused)}")
    return [named[folder] for folder in folders]


def _indices_in_list(file: Path, folders: Sequence[str]) -> list[int]:
    """For each folder the index of its name in a plain list.

    Sorted folders have more than one order: `10` comes before `2`, `Zebra` before `ant`. Raises ValueError where that cannot
    be settled.
    """
    indices = list(range(len(folders)))
    if list(folders) != sorted(folders):  # an order that somebody has chosen
        return indices
    if all(folder.isascii() and folder.isdecimal() for folder in folders):
        numbers = [int(folder) for folder in folders]
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{file}: two of the folders {some(folders)} are the same number: {PAIRS}")
        ranked = sorted(numbers)
        if ranked != numbers:
            notice(
                f"{file}: the {len(folders)} folders are numbers, names are given in numeric order: {some([*map(str, ranked)])}"
            )
        return [ranked.index(number) for number in numbers]
    for group in _numbered_alike(folders):
        other = sorted(group, key=_numbers)
        if other != group:
            raise ValueError(
                f"{file}: the folders have two orders, {some(group, 3)} and {some(other, 3)}: {PAIRS} to settle whose a name is"
            )
    other = sorted(folders, key=str.casefold)
    if other != list(folders):
        notice(f"{file}: names are given to the folders with upper case first: {some(folders)}; {PAIRS} if that is wrong")
    return indices


def _numbered_alike(folders: Sequence[str]) -> list[list[str]]:
    """Folders that differ in their numbers only, in their order."""
    groups = defaultdict(list)
    for folder in folders:
        groups[re.sub(r"\d+", "0", folder)].append(folder)
    return list(groups.values())


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
