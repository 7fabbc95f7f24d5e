"""The first screen of a run's report as a picture: how docs/quickstart.png is made.

Command: python experiments/report_picture.py runs/quickstart docs/quickstart.png
Needs Chromium or Chrome on the PATH.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rlbf_jax.errors import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def picture(report: Path, out: Path, width: int, height: int) -> None:
    """Renders a page without a window. Raises UserError where there is no page,
    no browser, or no picture came."""
    if not report.exists():
        raise UserError(f"{report}: no report here; make one with `rlbf run` or `rlbf report`")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(f"no browser on the PATH; install one of {', '.join(BROWSERS)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        made = Path(profile) / "screen.png"
        shown = subprocess.run(
            [*command, f"--screenshot={made}", report.resolve().as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if not made.exists():
            last = (shown.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{browser} made no picture of {report}: {last}")
        shutil.move(made, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--width", type=int, default=1200, help="pixels")
    parser.add_argument("--height", type=int, default=820, help="pixels")
    args = parser.parse_args()
    try:
        picture(args.run / "report.html", args.out, args.width, args.height)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
