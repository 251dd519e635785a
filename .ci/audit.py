"""Ask the package index about known vulnerabilities of what is installed; say so and go on where it cannot be asked."""

from __future__ import annotations

import json
import subprocess
import sys

COMMAND = (sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off")


def main() -> int:
    """Return 1 if a package has a known vulnerability, 0 if none has or none could be checked."""
    done = subprocess.run(COMMAND, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"pip-audit: the index cannot be reached, nothing was checked ({reason})")
        return 0
    checked = [package for package in packages if "vulns" in package]
    for package in checked:
        for found in package["vulns"]:
            fixes = ", ".join(found["fix_versions"]) or "no version"
            print(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixes}")
    if checked:
        print(
            f"pip-audit: {len(checked)} of {len(packages)} installed packages are known to the index and were checked"
        )
    else:
        print("pip-audit: the index says nothing on vulnerabilities, nothing was checked")
    return int(any(package["vulns"] for package in checked))


if __name__ == "__main__":
    sys.exit(main())
