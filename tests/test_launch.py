"""The launchers: what a dry run prints, and what the scripts do with stand-ins for python, srun, scontrol and gcloud.

A stand-in logs its arguments and ends, start by start, as its plan says.
"""

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
OPTIONS = ["--config=configs/c.py", "--config.note=two words; $HOME"]

# The program: its plan is a word for each start. hold: wait for SIGTERM, then end with 75; deaf: ignore SIGTERM;
# NUMBER: end with it; after-NUMBER: the same once another process holds; hit-NUMBER: the same after SIGTERM to the
# parent; preempt: take the slice away once its log is followed. $MEET processes wait for one another at each start, and
# end as planned then.
PROGRAM = """#!/usr/bin/env bash
trap '' TERM
if [ "$2" = pip ]; then exit 0; fi
case $PWD in */host?/rst_jax) id=${PWD%/rst_jax}; id=${id: -1} ;; *) id=${*: -1}; id=${id#--process_id=} ;; esac
id=${SLURM_PROCID-$id} plan=PLAN_${SLURM_PROCID-$id}
echo "$*" >> "$LOGS/program-$id"
starts=$(wc -l < "$LOGS/program-$id")
read -ra words <<< "${!plan-}"
word=${words[starts - 1]:-0}
echo "process $id, start $starts: $word"
until [ "$(cat "$LOGS"/program-* | wc -l)" -ge $((${MEET-0} * starts)) ]; do sleep 0.05; done
case $word in
  hold | deaf)
    if [ "$word" = hold ]; then trap 'rm "$LOGS/held-$id"; echo "$id" >> "$LOGS/terminated"; exit 75' TERM; fi
    touch "$LOGS/held-$id"
    while :; do sleep 0.05; done
    ;;
  after-*) until compgen -G "$LOGS/held-*" > /dev/null; do sleep 0.05; done ;;
  hit-*) kill -TERM "$PPID" ;;
  preempt)
    until [ "$(grep -cx 'ssh 0' "$LOGS/calls")" -ge 2 ]; do sleep 0.05; done
    echo SUSPENDED > "$LOGS/slice" && exit 0
    ;;
esac
exit "${word#*-}"
"""

# Runs the command once for each task, one after the other, and ends with the highest code.
SRUN = """#!/usr/bin/env bash
printf '%q ' srun "$@" >> "$LOGS/calls" && echo >> "$LOGS/calls"
while [[ $1 == --* ]]; do shift; done
worst=0
for ((task = 0; task < 2; task++)); do
  SLURM_PROCID=$task "$@" || { code=$?; worst=$((code > worst ? code : worst)); }
done
if [ -n "${SCANCEL-}" ]; then kill -TERM "$PPID"; fi
exit "$worst"
"""

SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$LOGS/calls"
"""

# A slice of two hosts, each a folder in which the commands sent to it are run.
GCLOUD = """
import os, pathlib, shutil, subprocess, sys
arguments, logs = sys.argv[1:], pathlib.Path(os.environ["LOGS"])
what, option = arguments[3], dict(a.split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
slice_, hosts = logs / "slice", [logs / "host0", logs / "host1"]
with (logs / "calls").open("a") as file:
    file.write(f"{what} {option.get('--worker', '')}".strip() + "\\n")
if "UNREACHABLE" in os.environ:
    sys.exit(1)
if what == "list" and slice_.exists():
    print(slice_.read_text().strip())
if what == "create":
    for host in hosts:
        host.mkdir()
    slice_.write_text("ACTIVE")
if what == "delete":
    for host in hosts:
        shutil.rmtree(host)
    slice_.unlink()
if what == "scp":
    for host in hosts:
        shutil.copy(arguments[4], host / arguments[5].partition(":")[2])
if what == "ssh":
    codes = []
    for host in hosts if option["--worker"] == "all" else [hosts[int(option["--worker"])]]:
        codes.append(subprocess.run(["bash", "-c", option["--command"]], cwd=host).returncode)
    sys.exit(next(filter(None, codes), 0) if slice_.read_text().strip() == "ACTIVE" else 255)
"""

# On a host: `-m pip` does nothing, `-m uv venv ... FOLDER` makes an environment whose python is the program.
PYTHON3 = """#!/usr/bin/env bash
if [ "$2" = uv ]; then mkdir -p "${*: -1}/bin" && cp "$(dirname "$0")/python" "${*: -1}/bin/python"; fi
"""


@pytest.fixture
def env(tmp_path):
    """An environment with the stand-ins first on PATH; logs go to $LOGS."""
    stand_ins, logs = tmp_path / "bin", tmp_path / "logs"
    stand_ins.mkdir()
    logs.mkdir()
    texts = {"python": PROGRAM, "python3": PYTHON3, "srun": SRUN, "scontrol": SCONTROL}
    texts["gcloud"] = f"#!{sys.executable} -IS\n{GCLOUD}"
    for name, text in texts.items():
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RST_", "SLURM_"))}
    return {**kept, "PATH": f"{stand_ins}:{os.environ['PATH']}", "LOGS": str(logs), "RST_POLL_SECONDS": "0"}


# Runs a command and waits for what it leaves behind too, which in a container may have nobody else to do so; a process
# that nobody waited for looks alive to `tail --pid`.
REAPER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
command, ended = subprocess.Popen(sys.argv[1:]), 0
while ended != command.pid:
    ended, status = os.wait()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def launch(script, arguments, env, **more):
    script = script if isinstance(script, Path) else LAUNCH / script
    command = [sys.executable, "-ISc", REAPER, "bash", str(script), *arguments]
    return subprocess.run(command, env={**env, **more}, capture_output=True, text=True, timeout=120)


def dry(script, arguments, env):
    """The commands that a dry run prints; it must have run none."""
    done = launch(script, ["--dry-run", *arguments], env, RST_PORT="20001")
    assert done.returncode == 0, done.stderr
    assert not list(Path(env["LOGS"]).iterdir())
    return done.stdout.splitlines()


def lines(env, name):
    path = Path(env["LOGS"]) / name
    return path.read_text().splitlines() if path.exists() else []


# local.sh


def test_local_dry_run(env):
    assert dry("local.sh", ["2", *OPTIONS], env) == [
        r"python -m rst_jax.main --config=configs/c.py --config.note=two\ words\;\ \$HOME "
        f"--coordinator=localhost:20001 --num_processes=2 --process_id={i} "
        for i in (0, 1)
    ]


def test_local_passes_the_arguments(env):
    done = launch("local.sh", ["2", *OPTIONS], env)
    assert done.returncode == 0, done.stderr
    (first,), (second,) = lines(env, "program-0"), lines(env, "program-1")
    start = "-m rst_jax.main --config=configs/c.py --config.note=two words; $HOME --coordinator=localhost:"
    assert first.startswith(start)
    assert second == first.replace("--process_id=0", "--process_id=1")


@pytest.mark.parametrize(
    ("plans", "code", "starts"),
    [
        (("75 137 0", "75 75 0"), 0, 3),
        (("75", "2"), 2, 1),
        (("1", "75"), 1, 1),
        (("75 1", "137 0"), 1, 2),
        (("3", "75"), 3, 1),
    ],
)
def test_local_starts_again_on_75_and_signals_only(env, plans, code, starts):
    done = launch("local.sh", ["2", *OPTIONS], env, PLAN_0=plans[0], PLAN_1=plans[1], MEET="2")
    assert done.returncode == code, done.stderr
    assert [len(lines(env, f"program-{i}")) for i in (0, 1)] == [starts, starts]


def test_local_gives_up_after_the_last_restart(env):
    done = launch("local.sh", ["1", *OPTIONS], env, PLAN_0="75 75 75 0", RST_MAX_RESTARTS="2")
    assert done.returncode == 75
    assert len(lines(env, "program-0")) == 3


def test_local_ends_the_others_when_one_fails(env):
    done = launch("local.sh", ["2", *OPTIONS], env, PLAN_0="hold", PLAN_1="after-2")
    assert done.returncode == 2
    assert lines(env, "terminated") == ["0"]


def test_local_kills_what_ignores_sigterm(env):
    done = launch("local.sh", ["2", *OPTIONS], env, PLAN_0="deaf", PLAN_1="after-1", RST_GRACE_SECONDS="0")
    assert done.returncode == 1


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_a_signal_on(env, sent):
    # A shell cannot catch a signal that was ignored when it started, as SIGINT is for tests run in the background.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-ISc", heed, "bash", str(LAUNCH / "local.sh"), "2", *OPTIONS]
    with subprocess.Popen(command, env={**env, "PLAN_0": "hold", "PLAN_1": "hold"}) as running:
        while len(list(Path(env["LOGS"]).glob("held-*"))) < 2:
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(sent)
        assert running.wait(60) == 75
    assert sorted(lines(env, "terminated")) == ["0", "1"]
    assert len(lines(env, "program-0")) == 1


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", *OPTIONS], OPTIONS])
def test_local_tells_how_it_is_called(env, arguments):
    done = launch("local.sh", arguments, env)
    assert done.returncode == 2
    assert "launch/local.sh [--dry-run] 2 --config=" in done.stderr


# slurm.sbatch


def test_slurm_dry_run(env):
    (line,) = dry("slurm.sbatch", OPTIONS, env)
    words = shlex.split(line)
    assert words[:5] == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=8", "bash", "-c"]
    assert words[6:] == ["rst_jax", "python", "-m", "rst_jax.main", *OPTIONS, "--coordinator=auto"]
    launch("slurm.sbatch", OPTIONS, env)
    assert lines(env, "calls") == [line]


def test_slurm_directives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    head = text[: text.index("\nset -euo")].splitlines()
    given = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in head if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in head)  # sbatch reads no directive after the first command
    assert given["gpus-per-node"] == given["ntasks-per-node"]
    assert given["signal"] == "TERM@120"
    assert {"requeue", "nodes", "time"} <= given.keys()


@pytest.mark.parametrize(
    ("plans", "code", "queued"),
    [
        (("0", "0"), 0, False),
        (("75", "0"), 75, True),
        (("75", "137"), 137, True),
        (("1", "75"), 1, False),
        (("137", "2"), 2, False),
        (("hit-75", "75"), 75, True),
    ],
)
def test_slurm_queues_again_on_75_and_signals_only(env, plans, code, queued):
    done = launch("slurm.sbatch", OPTIONS, env, PLAN_0=plans[0], PLAN_1=plans[1], SLURM_JOB_ID="7")
    assert done.returncode == code, done.stderr
    assert ("scontrol requeue 7" in lines(env, "calls")) == queued


@pytest.mark.parametrize("more", [{"SLURM_RESTART_COUNT": "100"}, {"SCANCEL": "1"}])
def test_slurm_queues_no_more(env, more):
    done = launch("slurm.sbatch", OPTIONS, env, PLAN_0="75", SLURM_JOB_ID="7", **more)
    assert done.returncode == 75
    assert len(lines(env, "calls")) == 1


# tpu_pod.sh


@pytest.fixture
def pod(tmp_path):
    """tpu_pod.sh in a working tree of its own."""
    for name in ("configs/c.py", "runs/old.txt"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True)
        (tmp_path / "tree" / name).touch()
    return Path(shutil.copytree(LAUNCH, tmp_path / "tree" / "launch")) / "tpu_pod.sh"


def test_pod_dry_run(env, pod):
    options = ["--name=n", "--zone=z", "--type=v5litepod-32", "--runtime=r", "--spot", "--bucket=b", "--delete"]
    printed = [shlex.split(line) for line in dry(pod, [*options, *OPTIONS], env)]
    assert not (pod.parent.parent / "build").exists()
    tpus = ["gcloud", "compute", "tpus"]
    queue = [line for line in printed if line[:4] == [*tpus, "queued-resources"]]
    assert [line[4] for line in queue] == ["list", "create", "delete"]
    assert queue[1][5:] == [
        *("n", "--node-id=n", "--zone=z", "--accelerator-type=v5litepod-32", "--runtime-version=r"),
        *("--spot", "--quiet"),
    ]
    assert queue[2] == printed[-1] == [*tpus, "queued-resources", "delete", "n", "--zone=z", "--force", "--quiet"]
    assert [*tpus, "tpu-vm", "scp", "build/n.tgz", "n:rst_jax.tgz", "--zone=z", "--worker=all", "--quiet"] in printed
    sent = [line for line in printed if line[:5] == [*tpus, "tpu-vm", "ssh"]]
    assert all(line[5:7] == ["n", "--zone=z"] for line in sent)
    commands = [line[-1].removeprefix("--command=") for line in sent]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    _, install, mount, start, follow, _ = commands
    assert install.endswith('-m pip install -q -e . "jax[tpu]"')
    assert mount.endswith(" b /bucket; }")
    assert f"-m rst_jax.main {OPTIONS[0]} --config.note=two\\ words\\;\\ \\$HOME --coordinator=auto;" in start
    assert follow.startswith("tail ")
    assert [line[7] for line in sent] == [f"--worker={w}" for w in ("0", "all", "all", "all", "0", "all")]


def test_pod_goes_on_after_a_preemption_and_a_75(env, pod):
    done = launch(pod, OPTIONS, env, PLAN_0="preempt 75 0", PLAN_1="0 0 0")
    assert done.returncode == 0, done.stderr
    calls = lines(env, "calls")
    assert [c for c in calls if c in ("create", "delete", "scp all")] == [
        *("create", "scp all", "delete", "create", "scp all", "scp all")
    ]
    for host in (0, 1):
        assert (
            lines(env, f"program-{host}")
            == ["-m rst_jax.main --config=configs/c.py --config.note=two words; $HOME --coordinator=auto"] * 3
        )
    assert [line for line in done.stdout.splitlines() if line.startswith("process")] == [
        *("process 0, start 1: preempt", "process 0, start 2: 75", "process 0, start 3: 0")
    ]
    copied = Path(env["LOGS"]) / "host1" / "rst_jax"
    assert (copied / "configs" / "c.py").exists()
    assert not (copied / "runs").exists()


def test_pod_stops_when_any_host_says_so(env, pod):
    done = launch(pod, ["--delete", *OPTIONS], env, PLAN_0="75", PLAN_1="2")
    assert done.returncode == 2, done.stderr
    assert len(lines(env, "program-0")) == 1
    assert lines(env, "calls")[-1] == "delete"


def test_pod_follows_what_still_runs(env, pod):
    assert launch(pod, OPTIONS, env).returncode == 0
    # The program of host 0 once more, as if this script had been stopped; it ends with 2 when it is followed.
    host, calls = Path(env["LOGS"]) / "host0", Path(env["LOGS"]) / "calls"
    follows = f'until [ "$(grep -c "ssh 0" {calls})" -eq 4 ]; do sleep 0.05; done; echo 2 > {host}/rst_jax.code'
    left = subprocess.Popen(["bash", "-c", follows], start_new_session=True)
    (host / "rst_jax.pid").write_text(str(left.pid))
    waiting = threading.Thread(target=left.wait)
    waiting.start()
    done = launch(pod, OPTIONS, env)
    waiting.join()
    assert done.returncode == 2, done.stderr
    assert lines(env, "calls").count("scp all") == 1
    assert "process 0, start 1: 0" in done.stdout


def test_pod_tells_how_it_is_called(env, pod):
    done = launch(pod, ["--sopt", *OPTIONS], env)
    assert done.returncode == 2
    assert "launch/tpu_pod.sh [--dry-run]" in done.stderr
    assert not lines(env, "calls")


def test_pod_gives_up(env, pod):
    assert launch(pod, OPTIONS, env, PLAN_0="75 75 0", RST_MAX_RESTARTS="1").returncode == 75
    assert len(lines(env, "program-0")) == 2
    done = launch(pod, OPTIONS, env, UNREACHABLE="1")
    assert done.returncode == 1
    assert "ten times" in done.stderr


# gke_jobset.yaml


def test_jobset():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"] == {
        "maxRestarts": 100,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [1, 2]},
    }
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert pod["terminationGracePeriodSeconds"] >= 60

    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    chips = math.prod(int(side) for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert replicated["replicas"] * job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert job["completions"] == job["parallelism"] == 4

    filled_in = jobset["metadata"]["annotations"]
    (volume,), (mounted,) = pod["volumes"], container["volumeMounts"]
    assert container["image"] == filled_in["rst-jax/image"]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == filled_in["rst-jax/bucket"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert mounted["name"] == volume["name"]
    assert container["command"] == ["python", "-m", "rst_jax.main"]
    assert container["args"][-1] == "--coordinator=auto"
    assert any(a.startswith(f"--workdir={mounted['mountPath']}/") for a in container["args"])
