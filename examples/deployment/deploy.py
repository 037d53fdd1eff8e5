"""Deploy the app on this machine: SuperLink, three SuperNodes and an edge.

    python deploy.py              # TLS everywhere, SuperNodes and edge authenticated
    python deploy.py --insecure   # neither
    python deploy.py --api legacy

It makes certificates, starts the processes, runs the app, and stops what it started.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from certificates import make_certificates, make_node_key, make_secret

HERE = Path(__file__).parent
TOOLS = Path(sys.executable).parent
CONNECTION = "deployment"
TASK = "digits_app.task:build_task"
# What each device's tensors may take; 0 is no limit.
BUDGETS_BYTES = (0, 2**17, 2**16)


def main() -> int:
    """Deploy, run, and stop; return 0 if the run went well."""
    arguments = parsed()
    if find_spec("flwr_smartsplit") is None:
        sys.exit(
            "flwr_smartsplit is not installed in this environment: run `pip install .` "
            "in the root of its repository, and not by its name: no index has it yet."
        )
    folder = Path(tempfile.mkdtemp(prefix="deployment-"))
    deployment = Deployment(folder, is_secure=not arguments.insecure)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        deployment.start()
        config = [f"api='{arguments.api}'", f"num-server-rounds={arguments.rounds}"]
        if arguments.journal:
            config.append(f"journal='{arguments.journal.resolve()}'")
        is_good = deployment.run(config)
        if arguments.keep:
            print(f"It waits. The edge listens at 127.0.0.1:{deployment.edge}.")
            input(f"export FLWR_HOME={folder} runs apps there. Press Enter to end it.")
        return 0 if is_good else 1
    finally:
        deployment.stop()
        shutil.rmtree(folder, ignore_errors=True)


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Deploy on this machine, and run.")
    parser.add_argument("--insecure", action="store_true", help="no TLS, no keys")
    parser.add_argument("--api", choices=["message", "legacy"], default="message")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--journal", type=Path, help="write the rounds' rows here")
    parser.add_argument("--keep", action="store_true", help="wait before the end")
    return parser.parse_args()


class Deployment:
    """The processes of one deployment, and their files in a folder."""

    def __init__(self, folder: Path, *, is_secure: bool) -> None:
        self.folder = folder
        self.is_secure = is_secure
        self.processes: list[tuple[str, subprocess.Popen]] = []
        self.superlink, self.edge, *self.nodes = free_ports(2 + len(BUDGETS_BYTES))
        self.environment = {
            **os.environ,
            "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder),
            # Otherwise Flower installs what an app names, from the package index.
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            # The ServerApp, which the SuperLink starts, reads these.
            "EDGE_CA_FILE": str(folder / "ca.pem"),
            "EDGE_SECRET_FILE": str(folder / "edge.secret"),
        }

    def start(self) -> None:
        """Make what they need, and start them all."""
        make_secret(self.folder / "edge.secret")
        if self.is_secure:
            make_certificates(
                self.folder, ["superlink", "edge"], ["localhost", "127.0.0.1"]
            )
        self._start_superlink()
        self._start_edge()
        for index in range(len(BUDGETS_BYTES)):
            if self.is_secure:
                make_node_key(self.folder, f"device-{index}")
                key = self.folder / f"device-{index}.pub"
                words = ["register", str(key), CONNECTION, "--name", f"device-{index}"]
                self.flwr("supernode", *words)
            self._start_node(index)

    def run(self, config: list[str]) -> bool:
        """Run the app, and say if it finished well."""
        config += [f"edge='127.0.0.1:{self.edge}'"]
        config += [f"edge-is-insecure={str(not self.is_secure).lower()}"]
        config += ["client-keys='node-name'"] if self.is_secure else []
        words = ["run", str(HERE), CONNECTION, "--stream", "--run-config"]
        log = self.flwr(*words, " ".join(config), is_shown=True)
        # The command itself returns 0 for a run that failed, too.
        (run_id,) = re.findall(r"Successfully started run (\d+)", log)
        words = ["list", CONNECTION, "--run-id", run_id, "--format", "json"]
        listed = self.flwr(*words)
        (run,) = json.loads(listed[listed.index("{") :])["runs"]
        print(f"The run: {run['status']}.")
        return run["status"] == "finished:completed"

    def stop(self) -> None:
        """End what was started, the last first, and nothing else."""
        for _, process in reversed(self.processes):
            # Each leads a group of its own, with the processes that it started.
            signal_group(process, signal.SIGTERM)
        for name, process in reversed(self.processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                print(f"{name} does not end; it is killed.")
            signal_group(process, signal.SIGKILL)
            process.wait()

    def flwr(self, *words: str, is_shown: bool = False) -> str:
        """Run a command of Flower; return what it prints."""
        with subprocess.Popen(
            ["flwr", *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if is_shown:
                    print(line, end="", flush=True)
        if process.returncode:
            sys.exit(f"flwr {' '.join(words)} fails:\n{''.join(lines)}")
        return "".join(lines)

    # --- each process -----------------------------------------------------------------

    def _start_superlink(self) -> None:
        trust = [f'root-certificates = "{self.folder / "ca.pem"}"']
        (self.folder / "config.toml").write_text(
            "\n".join(
                [
                    f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]',
                    f'address = "127.0.0.1:{self.superlink}"',
                    *(trust if self.is_secure else ["insecure = true"]),
                    "",
                ]
            )
        )
        words = ["--insecure"]
        if self.is_secure:
            words = ["--ssl-ca-certfile", str(self.folder / "ca.pem")]
            words += ["--ssl-certfile", str(self.folder / "superlink.pem")]
            words += ["--ssl-keyfile", str(self.folder / "superlink.key")]
            words += ["--enable-supernode-auth"]
        words += ["--port", str(self.superlink), "--isolation", "subprocess"]
        words += ["--disable-runtime-dependency-installation"]
        words += ["--database", str(self.folder / "superlink.db")]
        self._start("superlink", ["flower-superlink", *words])
        self._wait_for(self.superlink)

    def _start_edge(self) -> None:
        words = ["--insecure"]
        if self.is_secure:
            words = ["--tls-certificate", str(self.folder / "edge.pem")]
            words += ["--tls-key", str(self.folder / "edge.key")]
        words += ["--port", str(self.edge)]
        words += ["--admin-secret-file", str(self.folder / "edge.secret")]
        words += ["--spill", str(self.folder / "spill")]
        words += ["--memory", "1GiB", "--disk", "1GiB"]
        self._start("edge", ["smartsplit", "edge", TASK, *words])
        self._wait_for(self.edge)

    def _start_node(self, index: int) -> None:
        words = ["--insecure"]
        if self.is_secure:
            words = ["--root-certificates", str(self.folder / "ca.pem")]
            words += ["--auth-supernode-private-key"]
            words += [str(self.folder / f"device-{index}")]
        words += ["--superlink", f"127.0.0.1:{self.superlink}"]
        words += ["--port", str(self.nodes[index]), "--isolation", "subprocess"]
        has = f"partition-id={index} num-partitions={len(BUDGETS_BYTES)}"
        has += f' client-key="device-{index}" budget-bytes={BUDGETS_BYTES[index]}'
        words += ["--node-config", has]
        self._start(f"supernode {index}", ["flower-supernode", *words])

    def _start(self, name: str, words: list[str]) -> None:
        log = (self.folder / f"{name}.log").open("wb")
        process = subprocess.Popen(
            words,
            cwd=HERE,
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()
        self.processes.append((name, process))
        print(f"Started {name} (pid {process.pid}).", flush=True)

    def _wait_for(self, port: int) -> None:
        """Wait until the last process listens."""
        name, process = self.processes[-1]
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.2)
        log = (self.folder / f"{name}.log").read_text(errors="replace")
        sys.exit(f"{name} does not listen at port {port}:\n{log[-3000:]}")


def signal_group(process: subprocess.Popen, number: int) -> None:
    """Signal a process and those that it started."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())
