"""Push a model to the Hub: what export proved, with a card made from the run, and nothing else.

Enters: a repository's name and a finished stage. Leaves: the files in the repository; or, for a dry run, the list of
them and the card. A model that export refuses never leaves the machine.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from mllm import oracle
from mllm.card import card, on_hub
from mllm.config import RunConfig, stage_run
from mllm.export import Dtype, Exported, To, export
from mllm.export.seal import proven
from mllm.generate import find_folder

ALLOWED = (".safetensors", ".gguf", ".json", ".jinja", ".txt", ".model", ".md", ".yaml", ".py")
"""Kinds of files that may go up. Weights in safetensors (or GGUF) alone: a pickle can run code."""


@dataclass(frozen=True)
class Pushed:
    """What went up, or would."""

    repo: str
    url: str
    """Of the commit; empty where nothing was sent."""
    files: list[tuple[str, int]]
    """Names and bytes."""
    card: str
    exported: Exported
    note: str = ""

    def lines(self) -> list[str]:
        """What the command prints."""
        told = [f"{size:>14,}  {name}" for name, size in self.files]
        total = f"{sum(size for _, size in self.files):>14,}  bytes in {len(self.files)} files"
        end = f"pushed: {self.url}" if self.url else f"nothing was sent to {self.repo}: a dry run"
        end = f"note: {self.note}\n{end}" if self.note else end
        return [*(f"proven: {proof}" for proof in self.exported.proofs), *told, total, end]


def push(
    repo: str,
    model: str,
    to: To = "transformers",
    private: bool = False,
    dry_run: bool = False,
    dtype: Dtype = "auto",
    check_with: list[str] | None = None,
    exported: Path | None = None,
) -> Pushed:
    """Export, prove, describe, send. What was `exported` before is not written and proven again.

    Raises:
        ValueError: no such model, a proof that failed, an export of something else, a file that must not go up, or the
            Hub's refusal.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"{repo!r} is no name of a repository: expected OWNER/NAME")
    stage = find_folder(model)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / repo.rpartition("/")[2]
        found = copied(exported, stage, folder) if exported else export(model, folder, to, dtype, check_with)
        config = stage_run(stage)
        text = card(repo, stage, config, found, oracle.info(str(stage)))
        (folder / "README.md").write_text(text)
        files = listing(folder)
        url = "" if dry_run else send(repo, folder, private)
    return Pushed(repo, url, files, text, found, local_parts(config, found.to))


def copied(exported: Path, stage: Path, folder: Path) -> Exported:
    """A proven export under the name of the repository, by links where the disk allows: the card goes beside it."""
    found = proven(exported, stage)
    shutil.copytree(exported, folder, copy_function=link, ignore=shutil.ignore_patterns("README.md"))
    return replace(found, folder=folder)


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)


def check_alone(to: To | None, dtype: Dtype | None, check_with: list[str]) -> None:
    """Stop where the command asks an export that is there for another form.

    Raises:
        ValueError: names the flags.
    """
    given = {"--to": to, "--dtype": dtype, "--check-with": check_with}
    if named := [flag for flag, value in given.items() if value]:
        raise ValueError(f"{', '.join(named)} beside --exported: the export is there, in its own form")


def local_parts(config: RunConfig, to: str) -> str:
    """A stage folder names its frozen parts: said where they lie on this machine alone."""
    model = config.parts()
    here = [name for name in (*model.encoders(), model.llm) if not on_hub(name)]
    if not here or to != "merged":
        return ""
    return f"others cannot load it: config.yaml names parts of this machine ({', '.join(here)})"


def listing(folder: Path) -> list[tuple[str, int]]:
    """Every file that goes up.

    Raises:
        ValueError: one is of a kind that must not.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    if wrong := [path.name for path in found if path.suffix not in ALLOWED]:
        raise ValueError(f"{', '.join(wrong)} must not go up: allowed are {', '.join(ALLOWED)}")
    return [(str(path.relative_to(folder)), path.stat().st_size) for path in found]


def send(repo: str, folder: Path, private: bool) -> str:
    """One commit; the address of it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model and card by mllm push")
    except LocalTokenNotFoundError as error:
        raise ValueError("no token for the Hub: `hf auth login`, or set $HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise ValueError("HF_HUB_OFFLINE is set: nothing can be pushed (--dry-run shows what would be)") from error
    except HfHubHTTPError as error:
        raise ValueError(f"the Hub refused {repo}: {str(error).strip().splitlines()[-1]}") from error
    return str(commit.commit_url)
