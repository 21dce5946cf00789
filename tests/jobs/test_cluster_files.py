"""The cluster files are valid, say one version of everything, and are explained."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shlex
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from tests.small_job import environment_of, raylet_of, started_cluster

ROOT = Path(__file__).parent.parent.parent
CLUSTER, RAYJOB, DOCKERFILE = "cluster.yaml", "jobs/rayjob.yaml", "jobs/Dockerfile"
GUIDE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def obj(required: str = "", **properties) -> dict:
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


def array(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


STRING, INTEGER, BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
STRINGS = {"type": "object", "additionalProperties": STRING}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"},
}
CONTAINER = obj(
    "name image resources",
    name=STRING,
    image=STRING,
    imagePullPolicy=STRING,
    env=array(obj("name", name=STRING, value=STRING)),
    ports=array(obj("containerPort", containerPort=INTEGER, name=STRING)),
    lifecycle=obj("preStop", preStop=obj("exec", exec=obj("command", command=array(STRING)))),
    resources=obj("requests limits", requests=QUANTITIES, limits=QUANTITIES),
)
TOLERATION = obj(
    "",
    key=STRING,
    operator={"enum": ["Exists", "Equal"]},
    value=STRING,
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
POD = obj(
    "spec",
    metadata=obj("", labels=STRINGS, annotations=STRINGS),
    spec=obj(
        "containers",
        serviceAccountName=STRING,
        terminationGracePeriodSeconds=INTEGER,
        restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
        nodeSelector=STRINGS,
        tolerations=array(TOLERATION),
        containers=array(CONTAINER),
    ),
)
RAYJOB_SCHEMA = obj(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=obj("name", name=STRING, namespace=STRING, labels=STRINGS),
    spec=obj(
        "entrypoint rayClusterSpec",
        entrypoint=STRING,
        runtimeEnvYAML=STRING,
        shutdownAfterJobFinishes=BOOLEAN,
        ttlSecondsAfterFinished=INTEGER,
        activeDeadlineSeconds=INTEGER,
        backoffLimit=INTEGER,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        rayClusterSpec=obj(
            "headGroupSpec",
            rayVersion=STRING,
            authOptions=obj("mode", mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling=BOOLEAN,
            autoscalerOptions=obj(
                "",
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
                idleTimeoutSeconds=INTEGER,
            ),
            headGroupSpec=obj("rayStartParams template", rayStartParams=STRINGS, template=POD),
            workerGroupSpecs=array(
                obj(
                    "groupName minReplicas maxReplicas rayStartParams template",
                    groupName=STRING,
                    replicas=INTEGER,
                    minReplicas=INTEGER,
                    maxReplicas=INTEGER,
                    rayStartParams=STRINGS,
                    template=POD,
                )
            ),
        ),
    ),
)
"""What is used of a RayJob, after `ray.io_rayjobs.yaml` among KubeRay's custom resource definitions
(helm-chart/kuberay-operator/crds), which is too long to keep here."""


@pytest.fixture(scope="module")
def cluster() -> dict:
    """As Ray's launcher has it, with its defaults filled in."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(yaml.safe_load(text_of(CLUSTER)))


@pytest.fixture(scope="module")
def documents() -> dict[str, dict]:
    return {document["kind"]: document for document in yaml.safe_load_all(text_of(RAYJOB))}


@pytest.fixture(scope="module")
def app():
    path = ROOT / "jobs" / "generate.py"
    spec = importlib.util.spec_from_file_location("jobs_generate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.app


def test_ray_takes_the_cluster_file(cluster):
    from ray.autoscaler._private.util import validate_config

    validate_config(cluster)


def test_ray_refuses_what_it_does_not_know(cluster):
    from ray.autoscaler._private.util import validate_config

    wrong = copy.deepcopy(cluster)
    wrong["available_node_types"]["head"]["min_worker"] = 1
    with pytest.raises(jsonschema.ValidationError):
        validate_config(wrong)


def test_the_head_takes_no_actors_and_gpus_come_only_when_asked_for(cluster):
    types = dict(cluster["available_node_types"])
    head = types.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    for worker in types.values():
        assert worker["min_workers"] == 0
        assert worker["resources"]["GPU"] == 1
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert re.match(r"g[56]\.", worker["node_config"]["InstanceType"])
    assert all("IamInstanceProfile" in kind["node_config"] for kind in (head, *types.values()))


def test_every_node_has_the_token_and_nothing_else_to_wait_for(cluster, documents):
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert cluster["setup_commands"] == []
    assert documents["RayJob"]["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_what_is_installed_for_trying_out_is_what_was_sent():
    lines = re.findall(r"^#( +\S.*)$", text_of(CLUSTER), re.MULTILINE)
    trying = yaml.safe_load("\n".join(line[2:] for line in lines if line.startswith("   ")))
    (folder,) = trying["file_mounts"]
    (command,) = trying["setup_commands"]
    assert f"--constraint {folder}/constraints.txt {folder}" in command


def test_one_image_serves_both(cluster, documents):
    spec = documents["RayJob"]["spec"]["rayClusterSpec"]
    pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    images = {container["image"] for pod in pods for container in containers(pod)}
    assert images == {cluster["docker"]["image"]}
    assert f"docker build -f jobs/Dockerfile -t {images.pop()} ." in text_of(DOCKERFILE)


def containers(group: dict) -> list[dict]:
    return group["template"]["spec"]["containers"]


@pytest.mark.slow
def test_a_pod_that_is_to_end_drains_its_node_before_its_time_is_up(documents, tmp_path):
    """The command as it stands, but for the wait, which would see other tests' Ray."""
    (group,) = documents["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = containers(group)
    *shell, script = container["lifecycle"]["preStop"]["exec"]["command"]
    drain, wait = script.split("; ", 1)
    seconds = int(re.search(r"seconds (\d+)", drain)[1])
    assert seconds < group["template"]["spec"]["terminationGracePeriodSeconds"] == 120
    with started_cluster(environment_of(tmp_path)) as running:
        environment = {**running.environment, "RAY_ADDRESS": running.address}
        raylet = raylet_of(running.pid)
        for _ in range(3):  # on a busy machine a cluster that has only just begun may not answer
            if subprocess.run([*shell, drain], env=environment, timeout=300).returncode == 0:
                break
        raylet.wait(300)  # nothing is on it, so it ends at once
    assert wait == "while grep -qsx raylet /proc/[0-9]*/comm; do sleep 1; done"


class Metadata(BaseHTTPRequestHandler):
    """Of an EC2 machine, as IMDSv2 answers: with a token alone, and 404 until there is a notice."""

    noticed = threading.Event()
    asked = threading.Semaphore(0)

    def do_PUT(self):
        assert self.path == "/latest/api/token"
        assert int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
        self.answer(200, "a token")

    def do_GET(self):
        if self.headers["X-aws-ec2-metadata-token"] != "a token":
            self.answer(401)
        elif self.path == "/latest/meta-data/spot/instance-action" and self.noticed.is_set():
            self.answer(200, '{"action": "terminate", "time": "2026-11-25T08:22:00Z"}')
        else:
            self.answer(404)
        self.asked.release()

    def answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def metadata() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_a_spot_machine_that_is_taken_back_drains_its_node(metadata, tmp_path):
    with started_cluster(environment_of(tmp_path)) as running:
        environment = {
            **running.environment,
            "RAY_ADDRESS": running.address,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata,
        }
        raylet = raylet_of(running.pid)
        watching = [sys.executable, str(ROOT / "jobs" / "spot_notice.py")]
        with subprocess.Popen(watching, env=environment) as watch:
            for _ in range(2):
                assert Metadata.asked.acquire(timeout=300)
            assert watch.poll() is None
            assert raylet.is_running()
            Metadata.noticed.set()
            assert watch.wait(300) == 0
        raylet.wait(300)  # nothing is on it, so it ends at once


def test_every_machine_that_may_be_taken_back_is_watched(cluster):
    assert any(
        re.search(r"nohup python \S+/jobs/spot_notice\.py .*&$", line)
        for line in cluster["worker_start_ray_commands"]
    )


def test_the_token_that_the_guide_makes_is_its_owner_s_alone(tmp_path):
    (command,) = re.findall(r"^    (.*ray get-auth-token --generate.*)$", GUIDE, re.MULTILINE)
    environment = environment_of(tmp_path)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    subprocess.run(["/bin/sh", "-c", f"umask 022; {command}"], env=environment, check=True)
    token = tmp_path / ".ray" / "auth_token"
    assert len(token.read_text()) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_the_rayjob_has_the_shape_of_its_definition(documents):
    jsonschema.validate(documents["RayJob"], RAYJOB_SCHEMA)


def test_the_rayjob_scales_from_no_gpu_on_spot_and_uses_no_keys(documents):
    account = documents["ServiceAccount"]["metadata"]
    assert "eks.amazonaws.com/role-arn" in account["annotations"]
    job = documents["RayJob"]["spec"]
    cluster = job["rayClusterSpec"]
    assert job["shutdownAfterJobFinishes"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == 0
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["serviceAccountName"] == account["name"]
    assert not re.search(r"secret|access_key", text_of(RAYJOB) + text_of(CLUSTER), re.IGNORECASE)


def test_there_is_one_version_of_ray_and_of_python(documents):
    (pinned,) = re.findall(r"^ray==(.+)$", text_of("constraints.txt"), re.MULTILINE)
    images = re.findall(r"rayproject/ray:(\S+)", text_of(CLUSTER) + text_of(DOCKERFILE))
    assert {image.rsplit("-", 1)[0] for image in images} == {f"{pinned}-py311"}
    assert "Python 3.11" in text_of("constraints.txt")
    assert documents["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == pinned


def test_the_dockerfile_installs_where_the_entrypoint_is(documents):
    script = shlex.split(documents["RayJob"]["spec"]["entrypoint"])[1]
    assert f"COPY --chown=ray . {script.removesuffix('/jobs/generate.py')}\n" in text_of(DOCKERFILE)


def commands() -> list[str]:
    """Every `python generate.py ...`, of the guide and of the RayJob."""
    guide = re.findall(r"python \S*generate\.py --.*", GUIDE.replace("\\\n", " "))
    *_, job = yaml.safe_load_all(text_of(RAYJOB))
    return [*guide, job["spec"]["entrypoint"]]


@pytest.mark.parametrize("command", commands(), ids=["guide", "rayjob"])
def test_the_commands_are_ones_that_the_command_line_takes(app, command, tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"prompt": "a red circle", "subjects": ["circle"]}\n')
    filled = command.replace("s3://BUCKET/manifest.parquet", str(manifest))
    filled = re.sub(r"s3://BUCKET/\w+", str(tmp_path / "out"), filled)
    filled = re.sub(r"--model \S+", "--model shapes", filled)
    result = CliRunner().invoke(app, [*shlex.split(filled)[2:], "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "1 row in 1 shard" in result.output


@pytest.mark.parametrize("name", [CLUSTER, RAYJOB])
def test_the_guide_explains_all_that_is_to_be_filled_in(name):
    marks = set(re.findall(r"# FILL: (.+)$", text_of(name), re.MULTILINE))
    assert marks
    table = GUIDE.split(f"| in `{name}` | |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) == marks
    placeholders = re.compile(r"0{12}|BUCKET|REGISTRY")
    lines = text_of(name).splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if placeholders.search(line) and not line.startswith("#"):
            assert "FILL" in line + following or "--" in line, line
