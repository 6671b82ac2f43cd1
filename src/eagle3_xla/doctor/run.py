"""`doctor`: every rule on one head and its target, and the safe repairs."""

import json
from typing import Any

from eagle3_xla import storage
from eagle3_xla.doctor import config_rules, position_rules, weight_rules
from eagle3_xla.doctor.files import Finding, Target, read_target
from eagle3_xla.draft.saved import SavedHead, read_head
from eagle3_xla.errors import UserError
from eagle3_xla.storage import Location


def doctor(folder: Location, target_path: str, fix: bool = False) -> dict:
    """Check the head at `folder` against its target; with `fix`, mend config.json where that is safe and check again.

    Returns ok (no rule fails), rules (rule, status pass | warn | fail, message), fixed (field -> [before, after]),
    fixable (whether `fix` mends a rule that fails). Weights are never written. Raises UserError when there is no head
    or no target.
    """
    if fix and storage.is_url(folder):
        raise UserError(f"--fix mends a folder of this machine; copy {folder} here first")
    head = read_head(folder)
    target = read_target(target_path)
    findings = examine(head, target)
    fixed: dict[str, list] = {}
    if fix:
        # A repaired size lets other rules see more, so look again.
        for _ in range(3):
            changes = _changes(head, findings)
            for field, value in changes.items():
                fixed[field] = [fixed.get(field, [head.config.get(field)])[0], value]
                head.config.pop(field, None)
                head.config |= {} if value is None else {field: value}
            findings = examine(head, target)
        if fixed:
            storage.write(head.folder / "config.json", json.dumps(head.config, indent=2) + "\n")
    ok = all(finding.status != "fail" for finding in findings)
    rules = [{"rule": finding.rule, "status": finding.status, "message": finding.message} for finding in findings]
    fixable = any(finding.fix for finding in findings if finding.status == "fail")
    screen = _screen(folder, findings, fixed, fix)
    return {"ok": ok, "rules": rules, "fixed": fixed, "fixable": fixable, "screen": screen}


def examine(head: SavedHead, target: Target) -> list[Finding]:
    findings = [rule(head, target) for rule in (*config_rules.RULES, *position_rules.RULES)]
    findings.append(weight_rules.weight_file(head, target))
    if head.tensors:
        findings += [rule(head, target) for rule in weight_rules.RULES]
    return [*findings, weight_rules.tokenizer(head, target)]


def first_failure(folder: Location, target_path: str) -> str | None:
    """The first rule that fails, in the words of `doctor`; None for a head that passes."""
    rules = doctor(folder, target_path)["rules"]
    return next((f"{rule['rule']}: {rule['message']}" for rule in rules if rule["status"] == "fail"), None)


def _changes(head: SavedHead, findings: list[Finding]) -> dict:
    changes: dict[str, Any] = {}
    for finding in findings:
        changes |= finding.fix or {} if finding.status != "pass" else {}
    return {field: value for field, value in changes.items() if head.config.get(field) != value}


def _screen(folder: Location, findings: list[Finding], fixed: dict, fix: bool) -> str:
    width = max(len(finding.rule) for finding in findings)
    lines = [f"{finding.status}  {finding.rule:<{width}}  {finding.message}" for finding in findings]
    for field, (before, after) in fixed.items():
        lines.append(f"fixed {field}: {before} -> {'dropped' if after is None else after}")
    counts = {status: sum(finding.status == status for finding in findings) for status in ("fail", "warn")}
    lines.append(f"{folder}: {counts['fail']} rules fail, {counts['warn']} warn")
    if not fix and any(finding.fix and finding.status != "pass" for finding in findings):
        lines.append("--fix mends what config.json alone gets wrong")
    return "\n".join(lines)
