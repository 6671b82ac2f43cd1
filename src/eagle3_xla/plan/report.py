"""A verdict as text."""

from eagle3_xla.xla.tpu import GIB

TOKENS_OF = {
    "data.prepared": "the {:.1f}M tokens of all epochs of the prepared data",
    "plan.tokens": "{:.1f}M tokens, which plan.tokens assumes: no data is prepared",
}


def verdict_screen(verdict: dict) -> str:
    mesh = verdict["mesh"]
    where = f"{verdict['topology']}: {verdict['chips']} chips, dp={mesh['dp']} x tp={mesh['tp']}"
    where += f", draft dp={verdict['chips']}" if mesh["draft_data_parallel"] else ""
    needed, limit = verdict["hbm_bytes_per_chip"], verdict["hbm_limit_bytes"]
    memory = f"{needed / GIB:.2f} of {limit / GIB:.2f} GiB ({needed / limit:.0%})"
    if not verdict["fits"]:
        lines = [f"does not fit {where}", f"  HBM per chip     {memory}, {(needed - limit) / GIB:.2f} GiB too much"]
        lines += ["  largest buffers"]
        lines += [f"    {b['bytes'] / GIB:6.2f} GiB  {b['shape']}  {b['name']}" for b in verdict["largest_buffers"]]
        return "\n".join([*lines, f"  what helps       {verdict['advice']}", *_remarks(verdict)])
    parts, hbm = verdict["modelled_parts"], verdict["hbm"]
    share = {name: f"{hbm[name] / GIB:.2f}" for name in hbm}
    step = verdict["modelled_step_seconds"]
    matmul, traffic, exposed, hidden = (1e3 * parts[name] for name in parts)
    lines = [
        f"fits {where}",
        f"  HBM per chip     {memory}",
        f"                   arguments {share['arguments']}, temporaries {share['temporaries']}, code {share['code']}, "
        f"outputs {share['outputs']} of which {share['aliased']} reuse their arguments",
        f"  FLOPs per chip   {verdict['flops_per_chip'] / 1e12:.2f}e12 compiled (a loop's body once), "
        f"{verdict['model_flops_per_chip'] / 1e12:.2f}e12 needed by the maths",
        "  collectives      "
        + ", ".join(
            f"{count} {kind} ({verdict['collective_bytes'][kind] / 1e6:.0f} MB)"
            for kind, count in sorted(verdict["collectives"].items())
        ),
        f"  modelled step    {step * 1e3:.0f} ms: matmuls {matmul:.0f}, memory {traffic:.0f}, "
        f"collectives {exposed:.0f} (and {hidden:.0f} hidden)",
        f"                   a model, not yet compared with a chip; stated error {verdict['modelled_error']:.0%}",
        f"  host per step    {verdict['host_step_seconds'] * 1e3:.0f} ms"
        + (": more than the chips need, so the host is the limit; larger batches help" * verdict["host_is_the_limit"]),
        f"  modelled speed   {verdict['tokens_per_second']:,.0f} tokens/s, MFU {verdict['mfu']:.0%}",
    ]
    if verdict["modelled_hours"] is None:
        lines.append("  modelled run     unknown length: give --plan.tokens, or prepare the data first")
    else:
        price = f", ${verdict['dollars']:,.0f}" if verdict["dollars"] else ""
        lines.append(
            f"  modelled run     {verdict['modelled_hours'] * 60:.0f} minutes, {verdict['chip_hours']:.1f} chip-hours"
            f"{price} for {TOKENS_OF[verdict['tokens_of']].format(verdict['tokens'] / 1e6)}"
        )
    parts = {kind.replace("_", " "): size for kind, size in verdict["disk_bytes"].items() if size != 0}
    total = parts.pop("total")
    sizes = ", ".join(f"{kind} {'unknown' if size is None else f'{size / 1e9:.1f}'}" for kind, size in parts.items())
    lines.append(f"  disk             {'at least that:' if total is None else f'{total / 1e9:.1f} GB:'} {sizes}")
    return "\n".join([*lines, *_remarks(verdict)])


def _remarks(verdict: dict) -> list[str]:
    remarks = [f"  note             {note}" for note in verdict.get("notes", [])]
    if verdict["extrapolated"]:
        compiled, layers = verdict["compiled_layers"], verdict["layers"]
        remarks.append(
            f"  extrapolated     {compiled} of the target's {layers} layers were compiled, and what a further one costs"
        )
    return remarks
