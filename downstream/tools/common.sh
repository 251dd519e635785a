# Sourced by dist.sh and slurm.sh, with the task: where things are, which Python runs, and whether it can.
# Sets root, python and PYTHONPATH; fail MESSAGE ends with it.

fail() {
    echo "error: $1" >&2
    exit 2
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
# Threads that wait sleep: on a machine with other work, spinning keeps the one they wait for from its core.
[[ -n ${GOMP_SPINCOUNT:-}${KMP_BLOCKTIME:-} ]] || export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

package=mm$1
[[ $1 == cls ]] && package=mmpretrain
"$python" -c 'import importlib.util as util, sys; sys.exit(not all(map(util.find_spec, sys.argv[1:])))' mmengine mmcv "$package" ||
    fail "$python lacks mmengine, mmcv or $package: run \`make downstream\` in $root and \`source $root/.venv/bin/activate\`, or set PYTHON"
