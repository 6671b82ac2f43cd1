"""`push`: a head to the Hugging Face hub, with a model card whose figures were measured on this very head.

The card's table holds what `eval --json` and `bench --json` wrote; a head that `doctor` finds broken is not uploaded,
and a README.md that someone wrote or edited is kept, here and on the hub. The hub lists the figures from the card's
`model-index`; what is written to `.eval_results/` it puts on a benchmark's leaderboard, so that is done for named
benchmarks alone.
"""

import glob
import hashlib
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagle3_xla import storage
from eagle3_xla.checks import of_this_machine, one_line
from eagle3_xla.doctor.files import read_target
from eagle3_xla.doctor.run import first_failure
from eagle3_xla.draft.saved import read_head, weight_files
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.evaluate.fingerprint import head_fingerprint, target_fingerprint
from eagle3_xla.evaluate.page import NAME as REPORT
from eagle3_xla.evaluate.page import is_page
from eagle3_xla.evaluate.results import Figures, read_results
from eagle3_xla.serve.card import Licences, card
from eagle3_xla.serve.eval_results import PLACE, eval_results
from eagle3_xla.serve.run_facts import RunFacts, run_facts
from eagle3_xla.target.weights import INDEX

IDENTIFIER = r"[a-zA-Z0-9.+-]*"  # of a licence
MARK = "<!-- written by eagle3-xla push, sha256 {} -->\n"

NO_TOKEN = "the hub asks who you are: `hf auth login`, or set HF_TOKEN; the card is written"


@dataclass
class PushOptions:
    """results: files of `eval --json` or `bench --json`; run: folder that the head was trained in, "" for none;
    base_model: hub id of a target that is a folder; license, target_license, data_license: identifiers of the head's,
    the target's (default: what its README.md says) and the data's; benchmark: PROMPTS=OWNER/NAME:TASK, see
    `eval_results`; overwrite: files that were not written by us; report: the HTML page of `eval --report`, "" for none.
    """

    results: list[str] = field(default_factory=list)
    run: str = ""
    base_model: str = ""
    license: str = ""
    target_license: str = ""
    data_license: list[str] = field(default_factory=list)
    benchmark: list[str] = field(default_factory=list)
    private: bool = False
    dry_run: bool = False
    overwrite: bool = False
    report: str = ""


def push(folder: str | Path, target: str, repo: str, options: PushOptions) -> dict:
    """Write the card to `folder`/README.md and upload the head to `repo` (OWNER/NAME), unless `dry_run`.

    target: folder or hub id of the model it drafts for. `left_out` names what the card lacks for want of a file.
    Raises UserError for a head that fails a rule of `doctor`, for results that are none or another head's, for a
    README.md of someone else, for a repository of something else, for a card that the hub refuses (a license that it
    doesn't list); RunError when the upload fails.
    """
    if storage.is_url(folder):
        raise UserError(f"`push` writes its card into the head's folder; copy {folder} to this machine first")
    folder = Path(folder)
    base = options.base_model or (target if not Path(target).is_dir() else None)
    for name, value in (("--repo", repo), ("--base-model", base)):
        _check_id(name, value)
    if "/" not in repo:
        raise UserError(f"--repo {repo}: OWNER/NAME is expected")
    if base and repo.lower() == base.lower():
        raise UserError(f"--repo {repo} is the target; name a repository for the head")
    given = {"license": [options.license], "target-license": [options.target_license]}
    for name, values in (given | {"data-license": options.data_license}).items():
        for value in values:
            if not re.fullmatch(IDENTIFIER, value):
                raise UserError(f"--{name} {value!r}: an identifier such as apache-2.0 is expected")
    if problem := first_failure(folder, target):
        raise UserError(f"{folder} fails a rule of `doctor`, so it is not uploaded, {problem}")
    if not options.results:
        raise UserError("no results; give the output of `eval --json` or `bench --json` with --results FILE")
    readme = folder / "README.md"
    if readme.exists() and not options.overwrite and not _is_ours(readme):
        raise UserError(f"{readme} was not written by `push`, or was edited since; move it, or give --overwrite")
    head, of_target = read_head(folder), read_target(target)
    measured = [each for file in options.results for each in read_results(Path(file))]
    figures = [_of_this_head(each, folder, target) for each in measured]
    facts = RunFacts("", [], ["training, plan and limits (--run DIR)"])
    if options.run:
        facts = run_facts(of_this_machine(options.run, "--run"), head)
    target_licence = options.target_license or _licence_of(of_target.folder)
    licences = Licences(options.license, target_licence, tuple(filter(None, options.data_license)))
    results = eval_results(figures, options.benchmark, repo)
    found = {
        "the page of `eval --report` (--report FILE)": options.report,
        "licence of the head (--license ID)": licences.head,
        "licence of the target (--target-license ID, or its README.md)": licences.target,
        "licence of the data (--data-license ID)": licences.data,
        "the target's hub id (--base-model OWNER/NAME)": base,
        f"{PLACE} (--benchmark PROMPTS=OWNER/NAME:TASK)": results,
    }
    left_out = [*facts.left_out, *(name for name, value in found.items() if not value)]
    if options.report:
        _place_report(Path(options.report), folder, options.overwrite)
    if results:
        _place_results(results, folder / PLACE, options.overwrite)
    content = card(head, of_target, base, repo, figures, facts, licences, REPORT if options.report else "")
    storage.write(readme, content + MARK.format(hashlib.sha256(content.encode()).hexdigest()))
    weights = [*weight_files(folder), *folder.glob(INDEX)]
    files = ["config.json", *(file.name for file in weights), "README.md"]
    files += [*([REPORT] if options.report else []), *([PLACE] if results else [])]
    summary = {"repo": repo, "card": str(readme), "files": files, "left_out": left_out, "url": None}
    return summary if options.dry_run else summary | {"url": _upload(folder, files, repo, options)}


def _place_report(page: Path, head: Path, overwrite: bool) -> None:
    """Copy the page beside the head. Raises UserError when it is none of this head, or would replace another file."""
    try:
        content = page.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"--report {page}: {error.strerror}; the HTML file of `eval --report` is expected") from None
    if not is_page(content):
        raise UserError(f"--report {page}: not the HTML file of `eval --report`")
    if (head_fingerprint(str(head)) or " ") not in content:
        raise UserError(f"--report {page}: measured on another head; give the page of {head}")
    place = head / REPORT
    if place.exists() and not overwrite and not is_page(place.read_text(errors="replace")):
        raise UserError(f"{place} was not written by `eval --report`; move it, or give --overwrite")
    if not place.exists() or not place.samefile(page):
        place.write_text(content)


def _place_results(content: str, place: Path, overwrite: bool) -> None:
    first = content.partition("\n")[0]
    if place.exists() and not overwrite and not place.read_text(errors="replace").startswith(first):
        raise UserError(f"{place} was not written by `push`; move it, or give --overwrite")
    place.parent.mkdir(exist_ok=True)
    place.write_text(content)


def _licence_of(target: Path) -> str:
    """What the metadata of a model's README.md says, "" where it says nothing that can be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        about = metadata_load(target / "README.md")
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    licence = (about or {}).get("license_name") or (about or {}).get("license")
    return licence if isinstance(licence, str) and re.fullmatch(IDENTIFIER, licence) else ""


def _check_id(option: str, value: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if value is not None:
            validate_repo_id(value)
    except HFValidationError as error:
        raise UserError(f"{option} {value}: {str(error).splitlines()[0]}") from None


def _is_ours(readme: Path) -> bool:
    """Whether `push` wrote the file and nobody changed it."""
    content, _, _ = readme.read_bytes().rpartition(MARK.split("{}")[0].encode())
    return content + MARK.format(hashlib.sha256(content).hexdigest()).encode() == readme.read_bytes()


def _of_this_head(figures: Figures, folder: Path, target: str) -> Figures:
    """Raises UserError for figures of another head or target."""
    here = {"head": head_fingerprint(str(folder)), "target": target_fingerprint(target)}
    for name, path in (("head", folder), ("target", target)):
        if here[name] is None:
            raise UserError(f"the weights of {name} {path} are not here, so no figures can be known to be its own")
        if getattr(figures, name) != here[name]:
            raise UserError(
                f"--results {figures.file}: measured on another {name} ({getattr(figures, name)[:12]}; {path} is "
                f"{(here[name] or '')[:12]}); measure this one"
            )
    return figures


def _upload(head: Path, files: list[str], repo: str, options: PushOptions) -> str:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, XetError

    api, patterns = HfApi(), [glob.escape(file) for file in files]
    try:
        _check_card(api, (head / "README.md").read_text())
        url = api.create_repo(repo, private=options.private, exist_ok=True)
        there = api.list_repo_files(repo)
        # Of an earlier upload these would go on as this head's weights and figures.
        of_a_head = [name for name in there if re.fullmatch(r"[^/]*\.safetensors", name)]
        removed = [name for name in (*of_a_head, INDEX, REPORT, PLACE) if name not in files]
        _refuse_others(api, repo, [name for name in there if name in (*files, *removed)], options)
        api.upload_folder(
            repo_id=repo,
            folder_path=head,
            allow_patterns=patterns,
            delete_patterns=[glob.escape(name) for name in removed],
            commit_message="Upload EAGLE3 head",
        )
    except HFValidationError as error:
        raise UserError(f"--repo {repo}: {str(error).splitlines()[0]}") from None
    except LocalTokenNotFoundError:
        raise RunError(NO_TOKEN) from None
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, XetError) as error:  # OSError: HTTP errors too
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            raise RunError(NO_TOKEN) from None
        reason = one_line(error)[:300].replace(get_token() or "\0", "***")
        raise RunError(f"the upload to {repo} failed, start it again to finish: {reason}") from None
    return str(url)


def _check_card(api: Any, content: str) -> None:
    """Raises UserError when the hub refuses the card's metadata, which an upload asks once there is a repository."""
    try:
        api._validate_yaml(content)
    except OSError:  # the network, or an answer that is no JSON, which is a ValueError too
        raise
    except ValueError as error:
        raise UserError(f"the hub refuses the card: {one_line(error)}") from None


def _refuse_others(api: Any, repo: str, changed: list[str], options: PushOptions) -> None:
    """Raises UserError for a public repository with --private, and for one whose files are not `push`'s own.

    changed: its files that the upload replaces or removes.
    """
    if options.private and api.repo_info(repo).private is False:
        raise UserError(f"--private: {repo} is there already, and public; make it private first, or name another")
    if options.overwrite or not changed:
        return
    instead = "name another repository, or give --overwrite"
    if "README.md" not in changed:
        raise UserError(f"{repo} holds {changed[0]} and no README.md of `push`, so it is not ours; {instead}")
    with tempfile.TemporaryDirectory() as folder:
        if not _is_ours(Path(api.hf_hub_download(repo, "README.md", local_dir=folder))):
            raise UserError(f"the README.md of {repo} was not written by `push`, or was edited since; {instead}")
