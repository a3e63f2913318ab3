"""`sere similarity ...`: look at, pack and ship the files that `sere calibrate` makes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sere_ext.contract.errors import UsageError
from sere_ext.contract.files import write_whole

if TYPE_CHECKING:
    from sere_ext.similarity.file import Similarity

similarity_app = typer.Typer(
    name="similarity", help="Look at, pack and ship similarity files.", no_args_is_help=True, pretty_exceptions_enable=False
)


@similarity_app.command("show")
def show_command(
    file: Annotated[Path, typer.Argument(help="A similarity file, packed or not.")],
    report: Annotated[Path | None, typer.Option(help="Also write heat maps of the layers (.html).", show_default="none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metadata as JSON.")] = False,
) -> None:
    """What a similarity file was made from, and how alike the experts are; a wrong file is refused with the reason."""
    from sere_ext.similarity.file import read_similarity

    similarity = read_similarity(file)
    if report is not None:
        write_report(report, similarity)
    if as_json:
        typer.echo(json.dumps(similarity.meta.to_json_dict()))
        return
    print_similarity(file, similarity)


@similarity_app.command("pack")
def pack_command(
    file: Annotated[Path, typer.Argument(help="A similarity file.")],
    out: Annotated[Path, typer.Option(help="The packed file to write (.safetensors).")],
) -> None:
    """One byte per pair instead of eight; says what that changes. The plug-in reads both forms.

    The packed file has a digest of its own: tune with it if you mean to serve with it.
    """
    from sere_ext.similarity.file import packed_meta, read_similarity, write_similarity
    from sere_ext.similarity.stability import describe

    similarity = read_similarity(file)
    meta = packed_meta(similarity)
    assert meta.packing is not None
    written = write_similarity(out, meta, similarity.matrices)
    sizes = f"{file.stat().st_size:,} -> {out.stat().st_size:,} bytes"
    typer.echo(f"{out}: {sizes}; packing changes {describe(meta.packing.changes)}\n{written.digest}")


@similarity_app.command("shard")
def shard_command(
    file: Annotated[Path, typer.Argument(help="A similarity file; pack it first.")],
    name: Annotated[str, typer.Option(help="The ConfigMaps' name; a number is added to each.")],
    max_kib: Annotated[int, typer.Option(min=1, max=1000, help="Most KiB of a shard.")] = 900,
) -> None:
    """Print ConfigMaps that hold a file too large for one: pipe them into `kubectl apply --server-side -f -`."""
    from sere_ext.contract.config_maps import config_maps, encoded, uri
    from sere_ext.similarity.file import read_similarity

    read_similarity(file)
    items = config_maps(encoded(file.read_bytes(), max_kib * 1024), name)
    json.dump({"apiVersion": "v1", "kind": "List", "items": items}, sys.stdout)
    typer.echo()
    typer.echo(f"{len(items)} ConfigMaps; routing.similarity.uri: {uri(items)}", err=True)


@similarity_app.command("join")
def join_command(
    shards: Annotated[list[Path], typer.Argument(help="The shards in order, or the one folder they are mounted in.")],
    out: Annotated[Path, typer.Option(help="The similarity file to write (.safetensors).")],
) -> None:
    """Put a sharded file together again and check it."""
    from sere_ext.contract.shards import join
    from sere_ext.similarity.file import read_similarity

    if len(shards) == 1 and shards[0].is_dir():
        shards = sorted(path for path in shards[0].iterdir() if path.is_file() and not path.name.startswith("."))
    try:
        content = join([path.read_bytes() for path in shards])
    except OSError as error:
        raise UsageError(f"cannot read the shard {error.filename}: {error.strerror}") from error
    write_whole(out, content)
    typer.echo(f"{out}: {len(content):,} bytes from {len(shards)} shards, {read_similarity(out).meta.digest}")


def print_similarity(path: Path, similarity: Similarity, *, err: bool = False) -> None:
    """Print a line for each layer, what the file was made from, and how stable its assignments are."""
    from sere_ext.similarity.stability import describe as describe_changes
    from sere_ext.similarity.summary import describe

    meta = similarity.meta
    say: Callable[[str], None] = lambda text: typer.echo(text, err=err)  # noqa: E731
    say(describe(meta, similarity.matrices.values()))
    if meta.packing is not None:
        say(f"packed as {meta.packing.kind}, which changes {describe_changes(meta.packing.changes)}")
    if meta.stability is not None:
        say(f"stability: {describe_changes(meta.stability)} change between halves of the data")
    what = f"{meta.metric}, {len(meta.layers)} layers, {meta.num_experts} experts, {meta.tokens} tokens"
    say(f"{path}: {what}, {meta.model_name}{f' at {meta.model_revision}' if meta.model_revision else ''}, {meta.digest}")


def write_report(path: Path, similarity: Similarity) -> None:
    """Write the heat maps as one HTML page. Raises UsageError where the file cannot be written."""
    from sere_ext.similarity.heatmap import render

    try:
        path.write_text(render(similarity), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write the report {path}: {error.strerror}") from error
