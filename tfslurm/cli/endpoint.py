"""tfslurm endpoint: inference endpoints."""

from __future__ import annotations

from typing import Any

import click

from tfslurm.cli.context import Context, pass_context
from tfslurm.cli.options import confirm, listing_options, names_of, reference, yes_option
from tfslurm.cli.output import output_options, print_done, print_one, print_rows
from tfslurm.cli.waiting import timeout_option

STATUSES = ["pending", "starting", "healthy", "unhealthy", "stopping", "stopped", "error", "deleted"]


@click.group()
def endpoint() -> None:
    """Checkpoints served over HTTP, until someone stops them."""


def _view(settings: Any, ref: str) -> dict[str, Any]:
    from tfslurm.catalog.queries import find_endpoint, submissions_of
    from tfslurm.catalog.views import endpoint_view

    row = find_endpoint(ref, deleted=True)
    return endpoint_view(row, settings.root, submissions_of([row.id]).get(row.id))


@endpoint.command()
@click.argument("name")
@click.option("--checkpoint", required=True, shell_complete=names_of("checkpoint"), help="What to serve.")
@click.option("--instance", help="The size of machine; auto picks one.")
@click.option("--max-context", type=click.IntRange(1), help="Tokens of prompt and answer together.")
@click.option("--precision", default="auto", show_default=True, help="auto, bfloat16, float16 or float32.")
@click.option("--quantization", help="As vLLM names it, fp8 for one.")
@click.option("--wait", is_flag=True, help="Come back when it is healthy.")
@timeout_option
@output_options
@pass_context
def create(
    context: Context,
    name: str,
    checkpoint: str,
    instance: str | None,
    max_context: int | None,
    precision: str,
    quantization: str | None,
    wait: bool,
    timeout: float | None,
    output: str,
) -> None:
    """Serve a checkpoint. The API key is shown here, once.

    \b
    Examples:
      tfslurm endpoint create helper --checkpoint helpdesk-v1 --wait
      tfslurm endpoint chat helper "How do I register a dataset?"
    """
    settings = context.open()
    from tfslurm.serving.endpoints import Request, plan
    from tfslurm.serving.endpoints import create as submit

    request = Request(name, checkpoint, instance, max_context, precision, quantization)
    row, key = submit(settings, plan(settings, request))
    if wait:
        _wait(settings, row.id, timeout or settings.site.serving.start_timeout)
    print_one({**_view(settings, row.id), "key": key}, output)


def _wait(settings: Any, ref: str, timeout: float | None) -> dict[str, Any]:
    from tfslurm.cli.waiting import wait_for

    def line(view: dict[str, Any]) -> str:
        reason = (view["health"] or {}).get("reason") or view["slurm_reason"]
        return f"endpoint '{view['name']}': {view['status']}" + (f" ({reason})" if reason else "")

    bad = {"error", "stopped", "deleted"}
    return wait_for(settings, lambda: _view(settings, ref), good={"healthy"}, bad=bad, timeout=timeout, line=line)


@endpoint.command("list")
@listing_options(STATUSES)
@output_options
@pass_context
def list_(context: Context, output: str, **page: Any) -> None:
    """List endpoints, the newest first."""
    settings = context.refreshed()
    from tfslurm.catalog.models import Endpoint
    from tfslurm.catalog.queries import Page, endpoints, paged, submissions_of
    from tfslurm.catalog.views import endpoint_view

    rows = list(paged(endpoints(), Endpoint, Page(**page)))
    submissions = submissions_of(row.id for row in rows)
    views = (endpoint_view(row, settings.root, submissions.get(row.id)) for row in rows)
    print_rows(views, output, ("id", "name", "status", "url", "checkpoint", "instance", "owner", "created_at"))


@endpoint.command()
@reference("endpoint")
@output_options
@pass_context
def show(context: Context, ref: str, output: str) -> None:
    """Show an endpoint: its URL, its health and an example request."""
    from tfslurm.serving.client import example_request

    view = _view(context.refreshed(), ref)
    view["example"] = example_request(view["url"], view["name"]) if view["url"] else None
    example = view.pop("example") if output == "table" else None
    print_one(view, output)
    if example:
        click.echo(f"\nexample request:\n{example}")


@endpoint.command()
@reference("endpoint")
@click.argument("prompt")
@click.option("--model", help="Ask this model of the engine: the base model's name shows what training changed.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True)
@pass_context
def chat(context: Context, ref: str, prompt: str, model: str | None, max_tokens: int, temperature: float) -> None:
    """Ask the endpoint something, and print the answer as it comes.

    \b
    Examples:
      tfslurm endpoint chat helper "How do I register a dataset?"
      tfslurm endpoint chat helper --model smollm2-135m-instruct "How do I register a dataset?"
    """
    settings = context.refreshed()
    from tfslurm.catalog.queries import find_endpoint
    from tfslurm.errors import StatusError
    from tfslurm.serving.client import stream_chat
    from tfslurm.serving.supervisor import read_key

    row = find_endpoint(ref)
    if not row.url or row.status not in ("healthy", "unhealthy"):
        raise StatusError(f"endpoint '{row.name}' is {row.status}", hint=f"See `tfslurm endpoint show {row.name}`.")
    key = read_key(settings.root.endpoint(row.id).key)
    messages = [{"role": "user", "content": prompt}]
    for piece in stream_chat(row.url, key, model or row.name, messages, max_tokens=max_tokens, temperature=temperature):
        click.echo(piece, nl=False)
    click.echo()


@endpoint.command()
@reference("endpoint")
@click.option("-f", "--follow", is_flag=True, help="Go on until the endpoint has ended.")
@pass_context
def logs(context: Context, ref: str, follow: bool) -> None:
    """Print what the engine and its supervisor printed."""
    settings = context.refreshed()
    from tfslurm.catalog.models import EndpointStatus
    from tfslurm.catalog.queries import find_endpoint
    from tfslurm.cli.following import print_logs
    from tfslurm.sync import refresh

    row = find_endpoint(ref, deleted=True)

    def ended() -> bool:
        refresh(settings)
        return EndpointStatus(find_endpoint(row.id, deleted=True).status).ended

    print_logs(settings.root.endpoint(row.id).logs, r".*\.log", ended if follow else None)


@endpoint.command()
@reference("endpoint")
@output_options
@pass_context
def events(context: Context, ref: str, output: str) -> None:
    """List what happened to an endpoint, and who did it."""
    context.refreshed()
    from tfslurm.catalog.queries import events_of, find_endpoint
    from tfslurm.catalog.views import event_view

    rows = (event_view(event) for event in events_of(find_endpoint(ref, deleted=True).id))
    print_rows(rows, output, ("at", "actor", "change", "from", "to", "reason"))


@endpoint.command()
@reference("endpoint")
@click.option("--wait", is_flag=True, help="Come back when it has stopped.")
@output_options
@pass_context
def stop(context: Context, ref: str, wait: bool, output: str) -> None:
    """Let the engine finish its answers, and free the node."""
    settings = context.refreshed()
    from tfslurm.catalog.queries import find_endpoint
    from tfslurm.cli.waiting import wait_for
    from tfslurm.serving.endpoints import stop as end

    row = end(settings, find_endpoint(ref))
    if wait:
        wait_for(settings, lambda: _view(settings, row.id), good={"stopped"}, bad={"error"}, timeout=300)
    print_one(_view(context.refreshed(), row.id), output)


@endpoint.command()
@reference("endpoint")
@click.option("--wait", is_flag=True, help="Come back when it is healthy.")
@timeout_option
@output_options
@pass_context
def start(context: Context, ref: str, wait: bool, timeout: float | None, output: str) -> None:
    """Serve a stopped endpoint again: the same name, key and checkpoint."""
    settings = context.refreshed()
    from tfslurm.catalog.queries import find_endpoint
    from tfslurm.serving.endpoints import start as again

    row = again(settings, find_endpoint(ref))
    if wait:
        _wait(settings, row.id, timeout or settings.site.serving.start_timeout)
    print_one(_view(settings, row.id), output)


@endpoint.command("wait")
@reference("endpoint")
@timeout_option
@output_options
@pass_context
def wait_(context: Context, ref: str, timeout: float | None, output: str) -> None:
    """Come back when the endpoint is healthy: 0 healthy, 8 timed out, 9 it ended."""
    settings = context.refreshed()
    print_one(_wait(settings, ref, timeout or settings.site.serving.start_timeout), output)


@endpoint.command()
@reference("endpoint")
@yes_option
@output_options
@pass_context
def delete(context: Context, ref: str, yes: bool, output: str) -> None:
    """Hide a stopped endpoint, and free its name."""
    settings = context.refreshed()
    from tfslurm.catalog.queries import find_endpoint
    from tfslurm.serving.endpoints import delete as hide

    row = find_endpoint(ref)
    confirm(f"Delete endpoint '{row.name}'?", yes)
    hide(row)
    print_done(f"endpoint '{row.name}' is deleted", _view(settings, row.id), output)
