"""The tables of accuracies on digits and MNIST, for ``benchmarks.tables``."""

from __future__ import annotations

from benchmarks.shared import rows as result_rows


def accuracies(name: str) -> str:
    """The rows of ``make finetune`` as Markdown."""
    return _accuracies(result_rows.read(f"finetune/{name}"))


def _accuracies(rows: list[dict]) -> str:
    lines = [
        "| method | trained numbers | optimizer bytes | link | learning rate "
        "| test accuracy, % |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (
            row["method"],
            f"{row['trained']:,}",
            f"{row['optimizer_bytes']:,}",
            str(row["link"] or "-"),
            f"{row['learning_rate']:g}",
            _accuracy(row),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _accuracy(row: dict) -> str:
    return f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f}"


def rules() -> str:
    """RAC-LoRA on MNIST, columns sketched: accuracy and rate by link length."""
    rows = [row for row in _rules() if row["side"] == "right"]
    links = sorted({row["link"] for row in rows})
    names = ("trained numbers", "optimizer bytes", *(f"link {link}" for link in links))
    lines = [
        "| inside, rank, law | " + " | ".join(names) + " |",
        "|---" + "|---:" * len(names) + "|",
    ]
    lengths: dict[tuple, dict[int, dict]] = {}
    for row in sorted(rows, key=lambda r: (r["rank"], r["rule"].lower(), r["law"])):
        key = row["rule"], row["rank"], row["law"]
        lengths.setdefault(key, {})[row["link"]] = row
    for (rule, rank, law), cells in lengths.items():
        one = next(iter(cells.values()))
        texts = [f"{rule}, {rank}, {law}"]
        texts += [f"{one['trained']:,}", f"{one['optimizer_bytes']:,}"]
        texts += [
            f"{_accuracy(cells[link])}, {cells[link]['learning_rate']:g}"
            if link in cells
            else "-"
            for link in links
        ]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def beside_rules() -> str:
    """What stands beside RAC-LoRA in the study of rules, and the other side."""
    rows = [
        {
            **row,
            "method": ", ".join(
                str(word)
                for word in (
                    row["method"],
                    row["rule"],
                    row["rank"] and f"rank {row['rank']}",
                    row["law"],
                    row["side"],
                )
                if word
            ),
        }
        for row in _rules()
        if row["side"] != "right"
    ]
    return _accuracies(sorted(rows, key=lambda row: -row["accuracy_mean"]))


def _rules() -> list[dict]:
    return result_rows.read("finetune/mnist_rules")
