"""`qdist doctor`: say whether this machine is ready, and what to mend if not."""

import click

from qdist.host.doctor import Check, diagnose, look

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.pass_context
def doctor(context: click.Context) -> None:
    """Check driver, GPUs, packages, memory and disk; exit 1 when a run cannot work."""
    checks = diagnose(look())
    click.echo(report(checks))
    context.exit(1 if any(check.status == "fail" for check in checks) else 0)


def report(checks: tuple[Check, ...]) -> str:
    """One line a check, its remedy below it, and a line of sums."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{_status(check)}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<{width + 8}}try: {check.remedy}")
    return "\n".join((*lines, "", _sums(checks)))


def _status(check: Check) -> str:
    return click.style(f"{check.status:<4}", fg=_COLOURS[check.status], bold=check.status == "fail")


def _sums(checks: tuple[Check, ...]) -> str:
    failed, warned = (sum(check.status == status for check in checks) for status in ("fail", "warn"))
    if failed:
        return f"{failed} of {len(checks)} checks failed: runs will not work here until they are mended"
    return f"ready: {len(checks)} checks, {warned} with a warning" if warned else f"ready: {len(checks)} checks passed"
