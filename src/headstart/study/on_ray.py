"""A study on many machines: Ray's tasks are workers, which find their cells in the folder that all machines see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from headstart.errors import HeadstartError, RunError
from headstart.progress import Show, silent
from headstart.study.cells import Grid
from headstart.study.results import Results, all_cells
from headstart.study.tree import Study
from headstart.study.work import BAR, Terms, Worker, is_final

# Ray starts a lost worker's task again on another machine, so often; what was begun is gone on with.
_RETRIES = 3
_PAUSE = 1.0


def work_on_ray(
    grid: Grid,
    folder: Path,
    terms: Terms,
    address: str,
    workers: int,
    *,
    show: Show = silent,
    ended: Callable[[], None] = lambda: None,
) -> None:
    """Work on a study with Ray tasks, until nothing is left that could be begun.

    Each task asks for one accelerator where the cluster has any, else for its share of this machine's CPUs.

    Args:
        grid, folder, terms, show, ended: see :func:`headstart.study.workers.work_together`; the folder is on a file
            system that all machines see, under the same path, with locks.
        address: of the cluster, such as "auto" or "ray://host:10001"; "local" starts Ray on this machine.
        workers: how many tasks.

    Raises:
        RunError: Ray is not installed, or there is no cluster at that address.
        HeadstartError: a worker found a reason that keeps all cells from being begun, or was lost too often.
    """
    try:
        import ray
    except ImportError:
        raise RunError('--ray needs Ray: pip install "headstart[ray]".') from None
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(f"--ray {address}: {error}") from error
    try:
        resources: dict[str, Any] = {"num_cpus": 1}
        if ray.cluster_resources().get("GPU"):
            resources["num_gpus"] = 1
        remote = ray.remote(max_retries=_RETRIES, **resources)(_work)
        settings = grid.study.model_dump(mode="json")
        tasks = [remote.remote(settings, str(folder.resolve()), terms) for _ in range(workers)]
        results, last = Results(folder), -1
        while tasks:
            done, tasks = ray.wait(tasks, timeout=_PAUSE)
            cells = all_cells(grid, results, refine=terms.refine)
            finished = sum(is_final(results.of(cell), terms) for cell in cells)
            show(BAR, finished, len(cells))
            if finished > last:
                last = finished
                ended()
            for task in done:
                if reason := _outcome(ray, task):
                    raise HeadstartError(reason)
    finally:
        ray.shutdown()


def _outcome(ray: Any, task: Any) -> str:
    """Return why a task ended before its time; empty where it did its work."""
    try:
        return str(ray.get(task))
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"a worker on Ray was lost {_RETRIES + 1} times: {first}"


def _work(settings: dict[str, Any], folder: str, terms: Terms) -> str:
    """Be a worker; return why no cell can be begun, or nothing."""
    try:
        Worker(Grid(Study.model_validate(settings)), Path(folder), terms).work()
    except HeadstartError as error:
        return str(error)
    return ""
