"""What can be said of the images without building them: `scripts/build_image.sh --test` builds one for real and trains in it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from horoyolo.cli import NOT_YET, build_parser
from horoyolo.elastic.launch import build_elastic, is_elastic
from horoyolo.flags import train_config
from horoyolo.launch.hosts import parse_host_list

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
ENTRYPOINT = DOCKER / "entrypoint.sh"
DOCKERFILES = (DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu")
SCRIPTS = (ENTRYPOINT, ROOT / "scripts/build_image.sh")
INSTRUCTIONS = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
IMAGES = {"horoyolo:gpu", "horoyolo:cpu"}
HOME = "/home/horoyolo"


def instructions(path: Path) -> list[tuple[str, str]]:
    """A Dockerfile as (instruction, arguments), comments and line ends taken out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def last_stage(path: Path) -> list[tuple[str, str]]:
    """The instructions of the stage that becomes the image."""
    found = instructions(path)
    return found[max(index for index, (word, _) in enumerate(found) if word == "FROM") :]


def copied_from_here(path: Path) -> list[str]:
    """Files of this checkout that a Dockerfile copies."""
    words = [rest.split() for word, rest in instructions(path) if word == "COPY"]
    return [source for word in words if not word[0].startswith("--from") for source in word[:-1]]


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DOCKER / name).read_text()))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_use_known_instructions_and_stages(path: Path) -> None:
    stages: set[str] = set()
    for word, rest in instructions(path):
        assert word in INSTRUCTIONS
        if word == "FROM":
            stages.add(rest.split()[-1])
        for used in re.findall(r"from=([\w-]+)", rest):
            assert used in stages
    assert {"build", "runtime"} <= stages


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_pinned_by_build_arguments(path: Path) -> None:
    arguments = dict(rest.split("=", 1) for word, rest in instructions(path) if word == "ARG" and "=" in rest)
    for word, rest in instructions(path):
        if word == "FROM" and not rest.startswith("scratch"):
            image = arguments[re.fullmatch(r"\$\{(\w+)\} AS \w+", rest)[1]]  # type: ignore[index]
            assert ":" in image
            assert not image.endswith(":latest")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_image_runs_as_an_ordinary_user_without_compilers(path: Path) -> None:
    stage = last_stage(path)
    assert [rest for word, rest in stage if word == "USER"] == ["horoyolo"]
    words = [word for word, _ in stage]
    assert "RUN" not in words[words.index("USER") :]
    installed = " ".join(rest for word, rest in stage if word == "RUN")
    assert not re.search(r"g\+\+|gcc|make|-dev\b", installed)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_keys_and_no_settings_of_the_building_machine_stay(path: Path) -> None:
    for word, rest in instructions(path):
        assert word != "ENV" or not re.search("KEY|TOKEN|PASSWORD|INDEX_URL", rest)
        if "openssh-server" in rest:  # its installation makes host keys
            assert "rm -rf" in rest
            assert "/etc/ssh/ssh_host_*_key*" in rest
    for source in copied_from_here(path):
        assert not re.search(r"id_|_key|\.pem|\.ssh", source)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_reaches_the_build(path: Path) -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"  # a list of what is let in: a new folder of data or keys stays out
    let_in = {line[1:] for line in lines if line.startswith("!")}
    for source in copied_from_here(path):
        assert (ROOT / source).exists()
        assert source in let_in


def test_both_images_are_laid_out_alike() -> None:
    gpu, cpu = (last_stage(path) for path in DOCKERFILES)
    different = [pair for pair in zip(gpu, cpu, strict=True) if pair[0] != pair[1]]
    assert [(one[0], one[1].replace(other[1], "").strip()) for one, other in different[1:]] == [
        ("ENV", "NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility")
    ]
    assert different[0][0][1].replace(" ibverbs-providers", "") == different[0][1][1]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", path], check=True)


def test_one_port_everywhere() -> None:
    ports = {
        *re.findall(r"^\s*Port (\d+)", (DOCKER / "ssh_config").read_text() + (DOCKER / "sshd_config").read_text(), re.MULTILINE),
        *(rest for path in DOCKERFILES for word, rest in instructions(path) if word == "EXPOSE"),
    }
    for name in ("mpijob.yaml", "mpijob-elastic.yaml"):
        container = worker_pod(documents(name)[0])["containers"][0]
        ports |= {str(container["ports"][0]["containerPort"]), str(container["readinessProbe"]["tcpSocket"]["port"])}
    assert ports == {"2222"}


def run_entrypoint(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ENTRYPOINT, *words], env={"HOME": str(home), "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    (tmp_path / ".ssh").mkdir(mode=0o700)
    return tmp_path


def test_the_entry_point_runs_commands_word_by_word(home: Path) -> None:
    done = run_entrypoint(home, "printf", "%s|", "a b", "$HOME", "it's")
    assert (done.returncode, done.stdout) == (0, "a b|$HOME|it's|")
    assert run_entrypoint(home, "sh", "-c", "exit 75").returncode == 75


def test_a_worker_without_a_key_says_so(home: Path) -> None:
    done = run_entrypoint(home, "worker")
    assert done.returncode == 2
    assert done.stderr == f"worker: no key of a job in {home}/.ssh (id_ed25519 or id_rsa): mount one there; 'keys' as the command makes one\n"


def test_a_job_has_one_key_which_is_all_that_ssh_knows(home: Path) -> None:
    assert run_entrypoint(home, "keys").returncode == 0
    key = home / ".ssh/id_ed25519"
    made = key.read_text()
    assert run_entrypoint(home, "keys").returncode == 0
    assert key.read_text() == made
    key.chmod(0o444)  # as a mounted secret may be

    assert run_entrypoint(home, "true").returncode == 0
    state = home / ".sshd"
    assert (state / "key").read_text() == made
    public = " ".join(key.with_suffix(".pub").read_text().split()[:2])
    assert (state / "authorized_keys").read_text().startswith(public)
    assert (state / "known_hosts").read_text().startswith(f"* {public}")
    assert stat.S_IMODE((state / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_the_operators_key_is_taken(home: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-N", "", "-f", home / ".ssh/id_rsa"], check=True)  # its name, whatever it holds
    assert run_entrypoint(home, "true").returncode == 0
    assert (home / ".sshd/key").read_text() == (home / ".ssh/id_rsa").read_text()


def test_ssh_takes_the_clients_settings(home: Path) -> None:
    told = subprocess.run(["ssh", "-G", "-F", DOCKER / "ssh_config", "worker-1"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"port 2222", "stricthostkeychecking true", "identitiesonly yes"} <= set(told)
    for name, file in (("identityfile", "key"), ("userknownhostsfile", "known_hosts")):
        assert [line for line in told if line.startswith(f"{name} ") and line.endswith(f"/.sshd/{file}")]


def test_sshd_takes_the_workers_settings(home: Path) -> None:
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if sshd is None:
        pytest.skip("sshd is not installed")
    run_entrypoint(home, "keys")
    command = [sshd, "-T", "-f", str(DOCKER / "sshd_config"), "-h", str(home / ".ssh/id_ed25519")]
    if os.geteuid() == 0:  # only then it wants a folder that the system makes at its start
        command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && mkdir /run/sshd && exec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace can be made here: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    assert {"port 2222", "usepam no", "authenticationmethods publickey", "strictmodes yes"} <= set(lines)
    assert [line for line in lines if line.startswith("setenv PATH=/opt/horoyolo/bin:")]


def check_launch(words: list[str]) -> Any:
    """The parsed words of `horoyolo launch ... -- train ...`, all of which are known."""
    assert words[:2] == ["horoyolo", "launch"]
    parsed, unknown = build_parser().parse_known_args(words[1:])
    assert unknown == []
    check_train([word for word in parsed.job if word != "--"])
    return parsed


def check_train(words: list[str]) -> None:
    parsed, unknown = build_parser().parse_known_args(words)
    assert [word for word in unknown if word not in NOT_YET] == []
    train_config(parsed)


def test_compose_launches_on_its_own_workers() -> None:
    services = documents("compose.yaml")[0]["services"]
    workers = {name for name, service in services.items() if service["command"] == ["worker"]}
    launcher = services["launcher"]
    parsed = check_launch(shlex.split(launcher["command"]))
    hosts = parse_host_list(parsed.hosts)
    assert {host.name for host in hosts} == workers == set(launcher["depends_on"])
    assert parsed.num_proc == sum(host.slots for host in hosts)
    assert all(wanted == {"condition": "service_healthy"} for wanted in launcher["depends_on"].values())
    for name in (*workers, "launcher"):
        assert services[name]["hostname"] == name
        assert services[name]["init"] is True


def test_compose_makes_the_key_at_start_and_in_one_place_only() -> None:
    compose = documents("compose.yaml")[0]
    services = compose["services"]
    mounts = {name: [volume for volume in service["volumes"] if volume.startswith("keys:")] for name, service in services.items()}
    assert mounts.pop("keys") == [f"keys:{HOME}/.ssh"]
    assert all(volumes == [f"keys:{HOME}/.ssh:ro"] for volumes in mounts.values())
    assert services["keys"]["command"] == ["keys"]
    assert services["worker-1"]["depends_on"] == {"keys": {"condition": "service_completed_successfully"}}
    assert set(compose["volumes"]) == {"keys", "runs"}
    assert {service["image"] for service in services.values()} == {"${IMAGE:-horoyolo:cpu}"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_volumes_are_mounted_where_the_image_has_folders_of_its_user(path: Path) -> None:
    made = " ".join(rest for word, rest in last_stage(path) if word == "RUN" and "useradd" in rest)
    assert "--uid 1000" in made
    for folder in (f"{HOME}/.ssh", f"{HOME}/runs"):
        assert f" {folder}" in made


def worker_pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]


def launcher_words(job: dict[str, Any]) -> list[str]:
    return job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize("name", ["mpijob.yaml", "mpijob-elastic.yaml"])
def test_pods_of_the_job_fit_the_image(name: str) -> None:
    (job,) = documents(name)
    assert (job["apiVersion"], job["kind"], job["spec"]["sshAuthMountPath"]) == ("kubeflow.org/v2beta1", "MPIJob", f"{HOME}/.ssh")
    for replicas in job["spec"]["mpiReplicaSpecs"].values():
        pod = replicas["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] in IMAGES
        assert "command" not in container  # it would take the place of the entry point
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert f"{HOME}/runs" in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert worker_pod(job)["containers"][0]["args"] == ["worker"]


def test_the_job_asks_for_as_many_workers_as_it_has() -> None:
    (job,) = documents("mpijob.yaml")
    parsed = check_launch(launcher_words(job))
    assert parsed.num_proc == job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"] * job["spec"]["slotsPerWorker"]
    assert parsed.hostfile == "/etc/mpi/hostfile"
    gpus = worker_pod(job)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == job["spec"]["slotsPerWorker"]


def test_the_elastic_job_asks_the_operator_for_its_pods(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (job,), (static,) = documents("mpijob-elastic.yaml"), documents("mpijob.yaml")
    parsed = check_launch(launcher_words(job))
    slots = job["spec"]["slotsPerWorker"]
    assert is_elastic(parsed)
    assert (parsed.kubernetes, parsed.slots_per_host, parsed.min_np) == (True, slots, 1)
    assert parsed.max_np == job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"] * slots
    # What the operator writes while two pods run; it knows no slots.
    script = tmp_path / "discover_hosts.sh"
    names = [f"horoyolo-elastic-worker-{number}.horoyolo-elastic-worker.default.svc" for number in range(2)]
    script.write_text("#!/bin/sh\n" + "".join(f"echo {name}\n" for name in names))
    script.chmod(0o555)
    monkeypatch.setattr("horoyolo.elastic.launch.KUBERNETES", str(script))
    hosts = build_elastic(parsed, {}).ask()
    assert [(host.name, host.slots) for host in hosts] == [(name, slots) for name in names]
    # It may begin before all are there, and a launcher that is evicted has time to save.
    assert "launcherCreationPolicy" not in job["spec"]
    launcher = job["spec"]["mpiReplicaSpecs"]["Launcher"]
    assert launcher["restartPolicy"] == "OnFailure"
    assert launcher["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
    assert "--resume=auto" in launcher_words(job)
    # Pods and claims are those of the static job.
    assert worker_pod(job) == worker_pod(static)


def pip_settings() -> Any:
    spec = importlib.util.spec_from_file_location("pip_settings", DOCKER / "pip_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_builds_pip_conf_says_what_pip_does_here_with_folders_mounted() -> None:
    listing = """:env:.timeout='60'
global.cert='/etc/ssl/own.crt'
global.extra-index-url='file:///srv/pypi/simple https://user:word@mirror.example/simple'
global.find-links='/srv/wheels file:///srv/wheels https://mirror.example/wheels'
global.timeout='15'
global.no-color='true'
"""
    text, places = pip_settings().render(pip_settings().read_settings(listing))
    assert (
        text
        == """[global]
timeout = 60
extra-index-url =
    file:///run/wheels/0/simple
    https://user:word@mirror.example/simple
find-links =
    /run/wheels/1
    file:///run/wheels/1
    https://mirror.example/wheels
cert = /run/ca.crt
"""
    )
    assert places == {"/srv/pypi": "0", "/srv/wheels": "1"}


def test_a_machine_without_settings_gives_an_empty_pip_conf() -> None:
    assert pip_settings().render(pip_settings().read_settings("")) == ("[global]\n", {})


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--fast"], "unknown argument --fast; known are --gpu --test --out FILE --store DIR --mirror URL"),
        (["--out"], "--out wants a value"),
    ],
)
def test_build_image_refuses_what_it_does_not_know(words: list[str], complaint: str) -> None:
    done = subprocess.run([ROOT / "scripts/build_image.sh", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"build_image: {complaint}\n")
