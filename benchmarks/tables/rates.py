"""The tables of runs beside their bounds, from the rows of ``benchmarks.rates``."""

from __future__ import annotations

from benchmarks.shared import rows as result_rows


def rates() -> str:
    """Measured over bound, over all ranks of a problem, law and side."""
    rows = result_rows.read("rates/rates_bounds")
    rows = [row for row in rows if row["study"] == "bounds"]
    lines = [
        "| problem | law | side | ranks | gradient: measured / bound "
        "| gap: largest measured / bound | log-rate / bound: ranks to dim / 2, all |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        if row["law"] != "all of it":
            key = row["problem"], row["law"], row["side"]
            groups.setdefault(key, []).append(row)
    for key, group in groups.items():
        gradient = [row["nonconvex_over_bound"] for row in group]
        cells = [*key, f"1-{max(row['rank'] for row in group)}"]
        cells.append(f"{min(gradient):.2f}-{max(gradient):.2f}")
        if "pl_over_bound" in group[0]:
            half = [row["log_rate_over_bound"] for row in group if row["lam"] <= 0.5]
            rates = [row["log_rate_over_bound"] for row in group]
            cells.append(f"{max(row['pl_over_bound'] for row in group):.2f}")
            spans = (f"{min(v):.2f}-{max(v):.2f}" for v in (half, rates))
            cells.append(", ".join(spans))
        else:
            cells += ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def estimators() -> str:
    """Estimators at their largest step against their bounds, and long runs."""
    rows = result_rows.read("rates/rates_estimators")
    floors = {row["estimator"]: row for row in rows if row["study"] == "floor"}
    links = next(iter(floors.values()))["links"]
    lines = [
        "| estimator | gradient: measured / bound | largest step times L "
        f"| relative gap after {links:,} links |",
        "|---|---:|---:|---:|",
    ]
    for name, floor in floors.items():
        own = [r for r in rows if r["study"] == "estimators" and r["estimator"] == name]
        over, step = ([row[k] for row in own] for k in ("over_bound", "step_times_L"))
        spans = [f"{min(v):.2f}-{max(v):.2f}" if v else "-" for v in (over, step)]
        gap = f"{floor['relative_gap']:.0e}"
        lines.append("| " + " | ".join([name, *spans, gap]) + " |")
    return "\n".join(lines)


def certificates() -> str:
    """False alarms of sound runs, and links until a broken one was caught."""
    rows = result_rows.read("rates/rates_certificates")
    names = list(dict.fromkeys(row["run"] for row in rows))
    lines = [
        "| form | law | rank | " + " | ".join(names) + " |",
        "|---|---|---:|" + "---:|" * len(names),
    ]
    cases = dict.fromkeys((row["form"], row["law"], row["rank"]) for row in rows)
    by_cell = {(r["form"], r["law"], r["rank"], r["run"]): r for r in rows}
    for case in cases:
        cells = []
        for name in names:
            row = by_cell[(*case, name)]
            caught = row["links_until_caught"]
            said = f"{row['alarms']} of {row['seeds']}"
            if name != "sound" and caught:
                low, high = caught
                said = str(low) if low == high else f"{low}-{high}"
            cells.append(said)
        lines.append("| " + " | ".join([*map(str, case), *cells]) + " |")
    return "\n".join(lines)
