"""A verdict as text."""

GIB = 1024**3


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
        return "\n".join([*lines, f"  what helps       {verdict['advice']}"])
    parts, hbm = verdict["modelled_parts"], verdict["hbm"]
    share = {name: f"{hbm[name] / GIB:.2f}" for name in hbm}
    step = verdict["modelled_step_seconds"]
    matmul, traffic, exposed, hidden = (1e3 * parts[name] for name in parts)
    lines = [
        f"fits {where}",
        f"  HBM per chip     {memory}",
        f"                   arguments {share['arguments']}, temporaries {share['temporaries']}, code {share['code']}, "
        f"outputs {share['outputs']} of which {share['aliased']} reuse their arguments",
        f"  FLOPs per chip   {verdict['flops_per_chip'] / 1e12:.2f}e12 compiled, "
        f"{verdict['model_flops_per_chip'] / 1e12:.2f}e12 needed by the maths",
        "  collectives      "
        + ", ".join(
            f"{count} {kind} ({verdict['collective_bytes'][kind] / 1e6:.0f} MB)"
            for kind, count in sorted(verdict["collectives"].items())
        ),
        f"  modelled step    {step * 1e3:.0f} ms: matmuls {matmul:.0f}, memory {traffic:.0f}, "
        f"collectives {exposed:.0f} (and {hidden:.0f} hidden)",
        f"                   a model, not yet compared with a chip; stated error {verdict['modelled_error']:.0%}",
        f"  modelled speed   {verdict['tokens_per_second']:,.0f} tokens/s, MFU {verdict['mfu']:.0%}",
    ]
    if verdict["modelled_hours"] is None:
        lines.append("  modelled run     unknown length: give --plan.tokens, or prepare the data first")
    else:
        price = f", ${verdict['dollars']:,.0f}" if verdict["dollars"] else ""
        lines.append(
            f"  modelled run     {verdict['tokens'] / 1e6:.0f}M tokens: {verdict['modelled_hours'] * 60:.0f} minutes, "
            f"{verdict['chip_hours']:.1f} chip-hours{price}"
        )
    return "\n".join(lines)
