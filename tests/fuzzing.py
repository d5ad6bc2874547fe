"""Damaged and hostile files of every kind, and what reads them: `python -m tests.fuzzing KIND MUTATIONS FOLDER`.

With an address space of 2 GB and five seconds of a processor a file, nothing but ValueError may be raised, and nothing
be loaded that does not fit. Prints as JSON what was refused, loaded and wrong.
"""

import copy
import io
import json
import resource
import shutil
import signal
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np

SPACE, SECONDS = 2 * 2**30, 5.0
ODD = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**26, 0.0, -0.5, 1.5, 1e-300, 1e300, "", "x", "../../x",
    "/x", "\x1b[2J", "\u202e", "a" * 5000, [], {}, [1], [[]], {"a": 1}, [10**9, 1], [1] * 300, ["x"], {"name": "../x"},
]  # fmt: skip
SHAPES = [(), (0,), (1,), (2**40,), (2**31, 2**31), (3, 3), (1, 1, 1, 1), (8, 8, 1), (2**20, 10), (1000, 1000, 100)]
TYPES = ["|O", "<f4", ">f4", "<f8", "<f2", "|b1", "|u1", "<i4", "<i8", "<c8", "<U9", "|S0", "|V8", "<M8[s]", "no"]


def flipped(rng: np.random.Generator, content: bytes) -> bytes:
    """Bits, words, a piece cut out, put in or moved, the end cut off."""
    b, n = bytearray(content), len(content)
    if not n:
        return b"x"
    match rng.integers(8):
        case 0 | 1 | 2:
            for place in rng.integers(n, size=rng.integers(1, 4)):
                b[place] ^= 1 << rng.integers(8)
        case 3:
            return content[: rng.integers(n)]
        case 4:
            place, size = rng.integers(n), 2 ** rng.integers(4)
            b[place : place + size] = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * int(size)
        case 5:
            place, size = sorted(rng.integers(n, size=2))
            del b[place : place + min(size - place, 64)]
        case 6:
            place, other = rng.integers(n, size=2)
            b[place:place] = b[other : other + rng.integers(1, 64)]
        case 7:
            place, other = rng.integers(n, size=2)
            b[place : place + 16] = b[other : other + 16]
    return bytes(b)


def places(value: object, prefix: tuple = ()) -> Iterator[tuple]:
    """All places of nested values."""
    yield prefix
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*prefix, key))


def restructured(rng: np.random.Generator, value: object) -> object:
    """Nested values of which one is another, is gone, is there twice, or in the place of another."""
    value = copy.deepcopy(value)
    for _ in range(rng.integers(1, 3)):
        every = list(places(value))
        *folders, last = every[rng.integers(len(every))] or (None,)
        if last is None:
            continue
        here = value
        for folder in folders:
            here = here[folder]
        old = here[last]
        match rng.integers(6):
            case 0 | 1 | 2:
                here[last] = copy.deepcopy(ODD[rng.integers(len(ODD))])
            case 3:
                del here[last]
            case 4:
                if isinstance(here, list):
                    here.insert(last, copy.deepcopy(old))
                else:
                    here[f"{last}{rng.choice(['', 'x', '/..'])}"] = copy.deepcopy(old)
            case 5:
                if isinstance(old, int | float) and not isinstance(old, bool):
                    here[last] = type(old)(old * rng.choice([-1, 2, 0.5])) if abs(old) < 1e300 else 0
                else:
                    here[last] = [old]
    return value


def text(rng: np.random.Generator, content: bytes) -> bytes:
    """JSON of another structure, or no JSON."""
    kind = rng.integers(10)
    if kind < 7:
        return json.dumps(restructured(rng, json.loads(content))).encode()
    if kind == 7:
        numbers = [place for place, c in enumerate(content) if c in b"0123456789"] or [0]
        place = int(rng.choice(numbers))
        return (
            content[:place]
            + rng.choice([b"NaN", b"Infinity", b"1e999", b"-", b"9" * 5000, b"[" * 9000])
            + content[place:]
        )
    return flipped(rng, content)


def npy(rng: np.random.Generator, array: np.ndarray) -> bytes:
    """An .npy file whose header says another shape or type, or that holds other numbers."""
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    match rng.integers(6):
        case 0:
            header["shape"] = SHAPES[rng.integers(len(SHAPES))]
        case 1:
            header["shape"] = tuple(int(n) for n in rng.permutation(array.shape))
        case 2:
            header["descr"] = str(rng.choice(TYPES))
        case 3:
            array = np.resize(array, SHAPES[rng.choice([0, 1, 2, 5, 6, 7])])
            header["shape"] = array.shape
        case 4:
            array = (
                array.astype(rng.choice(["<f8", "<i8", "|u1", ">f4", "<f2"])) if array.dtype.kind in "fiub" else array
            )
            header |= {"descr": np.lib.format.dtype_to_descr(array.dtype)}
        case 5 if array.dtype.kind == "f" and array.size:
            array = array.copy()
            array.reshape(-1)[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -1e38])
    file = io.BytesIO()
    write = np.lib.format.write_array_header_1_0 if rng.integers(4) else np.lib.format.write_array_header_2_0
    write(file, header)
    return file.getvalue() + np.ascontiguousarray(array).tobytes()


def packed(entries: list[tuple[str, bytes]], kind: int = zipfile.ZIP_DEFLATED, bomb: int = 0) -> bytes:
    """The bytes of an archive, with an entry of so many million zeros."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", kind, compresslevel=1) as archive:
        warnings.simplefilter("ignore")
        for name, content in entries:
            archive.writestr(name, content)
        if bomb:
            with archive.open("bomb.npy", "w") as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (bomb << 20,)}
                np.lib.format.write_array_header_1_0(member, header)
                for _ in range(bomb):
                    member.write(bytes(1 << 20))
    return file.getvalue()


def archive(rng: np.random.Generator, content: bytes) -> bytes:
    """An archive with one entry changed, gone, there twice, under another name, or declared huge; or flipped bits."""
    if rng.integers(3) == 0:
        return flipped(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        entries = [(name, file.read(name)) for name in file.namelist()]
    place = int(rng.integers(len(entries)))
    name, old = entries[place]
    match rng.integers(9):
        case 0:
            del entries[place]
        case 1:
            entries.insert(int(rng.integers(len(entries))), (name, old))
        case 2:
            odd = ["x.npy", "../x.npy", "mask/x.npy", ".npy", name + "/x.npy", name.upper()]
            entries[place] = (str(rng.choice(odd)), old)
        case 3:
            other = int(rng.integers(len(entries)))
            entries[place], entries[other] = (name, entries[other][1]), (entries[other][0], old)
        case 4:
            entries[place] = (name, flipped(rng, old))
        case 5 if old[:1] != b"\x93":
            entries[place] = (name, old + bytes(2**20) if rng.integers(2) else b"")
        case 5 if rng.integers(4) == 0:
            return packed(entries, bomb=80)
        case 6:  # sizes in the central directory
            whole = bytearray(packed(entries))
            start = whole.rindex(b"PK\x01\x02") + int(rng.choice([16, 20, 24, 10, 42]))
            whole[start : start + 4] = int(rng.choice([0, 1, 2**31, 2**32 - 2])).to_bytes(4, "little")
            return bytes(whole)
        case _ if old[:1] == b"\x93":
            array = np.load(io.BytesIO(old), allow_pickle=False)
            if name == "meta.npy":
                array = np.frombuffer(text(rng, array.tobytes()), np.uint8)
                entries[place] = (name, npy_of(array))
            else:
                entries[place] = (name, npy(rng, array))
    return packed(entries, zipfile.ZIP_STORED if rng.integers(3) == 0 else zipfile.ZIP_DEFLATED)


def npy_of(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def told(rng: np.random.Generator, content: bytes) -> bytes:
    """An .npz file in which only what "meta" tells is another."""
    with np.load(io.BytesIO(content)) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["meta"] = np.frombuffer(text(rng, arrays["meta"].tobytes()), np.uint8)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


Mutate = Callable[[np.random.Generator, bytes], bytes]
Kind = tuple[list[tuple[Path, tuple[Mutate, ...]]], Callable[[Path], object]]  # files and what changes them; the reader


def drawn(name: str, pattern: str) -> tuple:
    """A ticket of random numbers and its weights; nothing is compiled."""
    import jax

    from rst_jax import subnet
    from rst_jax.models import ModelSpec
    from rst_jax.tickets.ticket import Origin, Ticket

    spec, rng = ModelSpec(name, 3, (0.3,), (0.4,), width=0.04), np.random.default_rng(0)
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
    shapes = jax.eval_shape(lambda x: spec.make().init(jax.random.key(0), x, train=False), images)
    params = jax.tree.map(lambda leaf: rng.choice([-0.5, 0.5], leaf.shape).astype(np.float32), shapes["params"])
    masks = jax.tree.map(lambda s: rng.random(s.shape) < 0.5, subnet.score_structs(params, pattern))
    stats = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes.get("batch_stats", {}))
    origin = Origin("ratio-0.5", "digits", 1, pattern, "kaiming_normal", 3, "holdout", 0.5, 0.25)
    return Ticket.make(spec, (8, 8, 1), 0.5, params, masks, stats, origin=origin), params


def check_ticket(ticket: object, digest: str = "") -> None:
    """It is what was saved, where its file could tell; and it can be called."""
    import jax

    from rst_jax.tickets.ticket import Ticket

    assert isinstance(ticket, Ticket)
    assert not digest or ticket.digest == digest, "another ticket under a valid digest"
    logits = jax.eval_shape(ticket, jax.ShapeDtypeStruct((2, *ticket.image_shape), np.float32))
    assert logits.shape == (2, ticket.model.num_classes), "logits of another shape"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ticket.variables)), "weights that are not finite"


def tickets(folder: Path) -> Kind:
    from rst_jax.tickets.file import load_ticket, save_ticket

    zoo = next((Path(__file__).parents[1] / "zoo").glob("*-0.05-*.ticket"))
    shutil.copy(zoo, folder / "old.ticket")
    digests = {"old.ticket": ""}  # of which only weights and statistics are known
    for name, pattern in (("conv2", "element"), ("resnet_digits", "row")):
        ticket, _ = drawn(name, pattern)
        save_ticket(ticket, folder / f"{name}.ticket")
        digests[f"{name}.ticket"] = ticket.digest
    return (
        [(folder / name, (archive, archive, told, told, flipped)) for name in digests],
        lambda path: check_ticket(load_ticket(path), digests[path.name]),
    )


def checkpoints(folder: Path) -> Kind:
    from rst_jax.tickets.store import restore_tickets, save_tickets

    ticket, params = drawn("conv2", "element")
    save_tickets(folder / "tickets", params, [ticket])
    about = folder / "tickets" / "about" / "metadata"
    files = [(path, (flipped,)) for path in (folder / "tickets").rglob("*") if path.is_file() and path != about]
    return (
        [(about, (text,))] * len(files) + files,
        lambda _: [check_ticket(t, ticket.digest) for t in restore_tickets(folder / "tickets")],
    )


def trainings(folder: Path) -> Kind:
    import jax
    import jax.numpy as jnp

    from rst_jax.records import digest
    from rst_jax.training.checkpoint import RunCheckpoints
    from rst_jax.training.state import TicketState

    tree = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(40, 5)), jnp.float32)}
    state = TicketState(jnp.int32(2), tree, {}, {}, ())
    store = RunCheckpoints(folder / "run")
    progress = {"best_step": 2, "best_natural": 0.5, "pending": [{"loss": 1.5}]}
    store.save_best(state)
    store.save_latest(state, progress)
    files = [(path, (flipped,)) for path in (folder / "run").rglob("*") if path.is_file()]
    told = next(path for path, _ in files if path.parent.name == "progress" and path.name == "metadata")

    def read(_: Path) -> None:
        found, kept = store.restore_latest(state)
        assert kept == progress, kept
        assert digest(jax.device_get(found)) == digest(jax.device_get(state))

    return [*files, *[(told, (text,))] * (len(files) // 4)], read


def unpacked(name: str, folder: Path) -> Path:
    import tarfile

    with tarfile.open(Path(__file__).parent / "golden" / f"{name}.tar.xz") as file:
        file.extractall(folder, filter="data")
    return next(p for p in folder.iterdir() if p.is_dir())


def cards(folder: Path) -> Kind:
    from rst_jax.reports.card import card_text, load_card, write_card_page
    from rst_jax.runtime.text import plain

    card = unpacked("card-0.3.0", folder)

    def read(path: Path) -> None:
        if path.suffix == ".json":
            assert all(plain(line) == line for line in card_text(load_card(card)).split("\n"))
        else:
            write_card_page(card)

    arrays = [(card / name, (archive,)) for name in ("examples.npz", "gallery.npz")]
    return [(card / "card.json", (text,))] * 400 + arrays, read


def records(folder: Path) -> Kind:
    from rst_jax.experiments.transfer import _read
    from rst_jax.records import R2SRecord, TicketRecord, TransferRecord, read_json
    from rst_jax.reports.report import report_text
    from rst_jax.reports.results import read_results
    from rst_jax.runtime.files import read_arrays
    from rst_jax.runtime.workdir import Claim

    workdir = unpacked("workdir-0.3.0-finished", folder)
    results, config = workdir / "results", json.loads((workdir / "config.json").read_text())
    flags = read_arrays(results / "flags" / "dense.npz")
    stamp = str(flags.pop("stamp"))

    def read(path: Path) -> object:
        if path.name == "config.json":
            with Claim(workdir, "config.json", config, "workdir", "run", "--workdir").held():
                return None
        if path.parent.name == "flags":
            return _read(path, stamp, flags)
        kinds = {"transfer.json": TransferRecord, "r2s.json": R2SRecord}
        if path.suffix == ".json":
            read_json(path, kinds.get(path.name, TicketRecord))
        return report_text(read_results(workdir, ["ratio-0.3", "ratio-0.5", "dense"]))

    told = [(results / f"{name}.json", (text,)) for name in ("ratio-0.3", "dense", "transfer", "r2s")]
    told += [(workdir / "config.json", (text,)), (workdir / "metrics.jsonl", (flipped,))]
    return [*told, (results / "gallery.npz", (archive,)), (results / "flags" / "dense.npz", (archive,))], read


def npz(folder: Path) -> Kind:
    from rst_jax.config import Config
    from rst_jax.data import load_dataset, load_test

    rng, path = np.random.default_rng(0), folder / "d.npz"
    images, labels = rng.integers(256, size=(20, 4, 4, 3), dtype=np.uint8), np.arange(20, dtype=np.int32) % 4
    np.savez_compressed(path, x_train=images, y_train=labels, x_test=images[:9], y_test=labels[:9])
    config = Config(dataset="npz", data_path=str(path), model="conv2", holdout=5)

    def read(path: Path) -> None:
        images, labels, _ = load_test("npz", "", str(path)).batch()
        data = load_dataset(config)
        assert images.min() >= 0
        assert images.max() <= 1
        assert labels.min() >= 0
        assert labels.max() < data.num_classes

    return [(path, (archive,))], read


def lone(rng: np.random.Generator, content: bytes) -> bytes:
    """An .npy file of another header or of other numbers."""
    return npy(rng, np.load(io.BytesIO(content), allow_pickle=False))


def npys(folder: Path) -> Kind:
    from rst_jax.data import load_test

    rng, path = np.random.default_rng(0), folder / "fog.npy"
    np.save(path, rng.integers(256, size=(20, 4, 4, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.arange(20, dtype=np.uint8) % 4)

    def read(_: Path) -> None:
        images, labels, ids = load_test("npz", "", str(path)).batch()
        assert images.ndim == 4
        assert len(images) == len(labels) == len(ids)
        assert labels.min() >= 0

    return [(path, (lone, lone, flipped)), (folder / "labels.npy", (lone, lone, flipped))], read


def prepared(folder: Path) -> Kind:
    import tensorflow_datasets as tfds

    from rst_jax.data.prepared import Prepared

    class Little(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = folder

        def _info(self) -> tfds.core.DatasetInfo:
            image = tfds.features.Tensor(shape=(4, 4, 3), dtype=np.uint8)
            features = {"image": image, "label": tfds.features.ClassLabel(names=["cat", "dog"])}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _: object) -> dict:
            return {"test": ((i, {"image": np.full((4, 4, 3), i, np.uint8), "label": i % 2}) for i in range(20))}

        def _generate_examples(self) -> None:
            """TFDS asks for one."""

    options = tfds.download.DownloadConfig(num_shards=2)
    Little(data_dir=folder, file_format="array_record").download_and_prepare(download_config=options)
    there = [path for path in (folder / "little" / "1.0.0").iterdir() if path.is_file()]

    def read(_: Path) -> None:
        images, labels = Prepared("little", folder).examples("test")
        assert images.shape == (len(labels), 4, 4, 3)
        assert set(labels) <= {0, 1}

    return [(path, (text, flipped) if path.suffix == ".json" else (flipped,)) for path in there], read


def replayed(folder: Path) -> Kind:
    import rst_jax

    rng = np.random.default_rng(0)
    weights, images = rng.normal(size=(16, 3)).astype(np.float32), rng.random((9, 4, 4, 1), np.float32)

    def network(x: np.ndarray) -> np.ndarray:
        return (x.reshape(x.shape[0], -1) - 0.5) @ weights

    options = {"folder": folder, "keep_images": True}
    rst_jax.evaluate(network, images, np.argmax(network(images), -1), rst_jax.ThreatModel(0.1), "fgsm", **options)
    own = set(rst_jax.replay(network, folder).values())

    def read(_: Path) -> None:
        assert set(rst_jax.replay(network, folder).values()) <= own, "figures of other images"

    arrays = [(folder / name, (archive,)) for name in ("adversarials.npz", "examples.npz")]
    return [*arrays, (folder / "card.json", (text,))], read


def pth(folder: Path) -> Kind:
    import jax
    import torch

    from rst_jax.interop import from_official
    from rst_jax.models import ModelSpec

    model, rng = ModelSpec("conv2", 3, (0.3,), (0.4,), width=0.04).make(), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32), train=False))
    entries = {}
    for where, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
        name = "module." + ".".join(k.key.replace("_", ".") for k in where[:-1])
        oihw = (*reversed(leaf.shape[-2:]), *(leaf.shape[:-2] or (1, 1)))
        for what in ("weight", "scores"):
            entries[f"{name}.{what}"] = torch.tensor(rng.normal(size=oihw).astype(np.float32))
    torch.save({"state_dict": entries, "best": np.float64(0.5)}, folder / "a.pth")
    torch.save({"state_dict": entries}, folder / "old.pth", _use_new_zipfile_serialization=False)

    def read(path: Path) -> None:
        variables = from_official(path, model, (8, 8, 1))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))

    return [(folder / "a.pth", (archive,)), (folder / "a.pth", (archive,)), (folder / "old.pth", (flipped,))], read


KINDS = {f.__name__: f for f in (tickets, checkpoints, trainings, cards, records, npz, npys, prepared, replayed, pth)}


class Slow(BaseException):
    """A file took too long."""


def _slow(_: int, frame: FrameType | None) -> None:
    raise Slow("".join(traceback.format_stack(frame, 4)))


def run(kind: str, mutations: int, folder: Path) -> dict[str, object]:
    """How many files were refused and loaded, and what went wrong."""
    files, read = KINDS[kind](folder)
    for path, _ in files:
        read(path)
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    signal.signal(signal.SIGVTALRM, _slow)
    refused, loaded, wrong = 0, 0, []
    for seed in range(mutations):
        rng = np.random.default_rng(seed)
        path, ways = files[rng.integers(len(files))]
        whole = path.read_bytes()
        changed = ways[rng.integers(len(ways))](rng, whole)
        path.write_bytes(changed)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            read(path)
            loaded += 1
        except ValueError as error:
            refused += 1
            if not str(error):
                wrong.append((seed, "a ValueError that says nothing"))
        except BaseException:
            wrong.append((seed, path.name, traceback.format_exc()[-1500:]))
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            path.write_bytes(whole)
    return {"refused": refused, "loaded": loaded, "wrong": wrong}


if __name__ == "__main__":
    import logging

    warnings.simplefilter("ignore")
    logging.disable()
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
