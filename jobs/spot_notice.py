"""Watch for AWS's interruption notice of this spot instance, two minutes ahead, and drain its Ray node.

`cluster.yaml` runs this beside Ray on every spot instance. A drained node gets no new work; its actor
finishes and commits what it has. The notice is an item of the instance metadata, which returns 404 until
an interruption is scheduled:
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
"""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.request

METADATA = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
SECONDS_BETWEEN_LOOKS = 5
SECONDS_LEFT = 110  # of the two minutes, after the longest poll interval and a slow response
DRAIN = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
DRAIN += ["--reason-message", "AWS takes the spot machine back"]


def request(path: str, method: str = "GET", **headers: str) -> str:
    asked = urllib.request.Request(f"{METADATA}/latest/{path}", method=method, headers=headers)
    with urllib.request.urlopen(asked, timeout=2) as answer:
        return answer.read().decode()


def is_noticed() -> bool:
    """Return whether an interruption is scheduled; False also while the metadata service does not respond."""
    try:
        token = request("api/token", "PUT", **{"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        request("meta-data/spot/instance-action", **{"X-aws-ec2-metadata-token": token})
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
    return True


if __name__ == "__main__":
    while not is_noticed():
        time.sleep(SECONDS_BETWEEN_LOOKS)
    end = time.monotonic() + SECONDS_LEFT
    while (left := round(end - time.monotonic())) > 0:
        if subprocess.run([*DRAIN, "--deadline-remaining-seconds", str(left)]).returncode == 0:
            break
        time.sleep(1)
