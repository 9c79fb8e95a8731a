"""Full disks, damaged databases, migrations and blobs: nothing half done is ever visible."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, select
from tiny_device import World, settle

from evensong.coordinator import tables
from evensong.coordinator.blobs import BlobStore
from evensong.coordinator.database import Database
from evensong.coordinator.errors import StorageError
from evensong.coordinator.spool import Spool
from evensong.v1 import common_pb2
from evensong.wire.chunks import split

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def raise_no_space(*_: Any, **__: Any) -> None:
    raise NO_SPACE


# ---------------------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_refuses_the_update_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async def run() -> None:
        async with World(tmp_path / "data", log_level="error") as world:
            world.core.context.settings = world.settings.model_copy(update={"durable": True})
            await world.submit(goal=1, minimum=1)
            (device,) = await world.enrol(1)
            lease = (await device.check_in()).assignment.lease
            update = device.make_update(world.layout, world.codec)
            with monkeypatch.context() as patch:
                patch.setattr(os, call, raise_no_space)
                begun = await device.begin(lease, update)

                answer = await device.chunk(begun.upload_id, lease, next(split(update, 1 << 20)))
                if not answer.HasField("refusal"):
                    answer = await device.commit(begun.upload_id, lease)
                assert answer.refusal.reason == common_pb2.REFUSAL_REASON_UNAVAILABLE
                assert answer.retry.latest_ms > 0
                with world.core.context.database.read() as tx:
                    assert tx.execute(select(tables.journal)).all() == []
            upload_id = await device.upload(lease, update)
            assert not (await device.commit(upload_id, lease)).HasField("refusal")
            await settle()
            assert world.task().version == 1

    asyncio.run(run())


def test_a_full_disk_in_the_database_changes_nothing_and_is_over_when_there_is_room(tmp_path: Path) -> None:
    async def run() -> None:
        async with World(tmp_path / "data", log_level="error") as world:
            await world.submit(goal=1, minimum=1)
            (device,) = await world.enrol(1)
            answer = await device.check_in()
            upload_id = await device.upload(answer.assignment.lease, device.make_update(world.layout, world.codec))
            limit_pages(world.core.context.database, to_what_is_there=True)
            refused = await device.commit(upload_id, answer.assignment.lease)
            for _ in range(100):  # free pages may take a few small rows
                if refused.HasField("refusal"):
                    break
                refused = await device.check_in()
            limit_pages(world.core.context.database, to_what_is_there=False)
            assert refused.refusal.reason in (
                common_pb2.REFUSAL_REASON_UNAVAILABLE,
                common_pb2.REFUSAL_REASON_UNSPECIFIED,
            )
            await world.clock.advance(2_000)
            committed = await device.commit(upload_id, answer.assignment.lease)
            assert committed.refusal.reason in (0, common_pb2.REFUSAL_REASON_ALREADY_REPORTED)
            await settle()
            assert world.task().version == 1

    asyncio.run(run())


def limit_pages(database: Database, *, to_what_is_there: bool) -> None:
    with database.transaction() as tx:
        pages = tx.connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        tx.connection.exec_driver_sql(f"PRAGMA max_page_count={pages if to_what_is_there else 1 << 30}")


def test_a_failed_server_step_for_want_of_space_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with World(tmp_path / "data", log_level="error") as world:
            await world.submit(goal=1, minimum=1)
            (device,) = await world.enrol(1)
            with monkeypatch.context() as patch:
                patch.setattr(BlobStore, "publish", raise_no_space)
                await world.train(device)
                await world.clock.advance(3_000)
                assert world.task().version == 0
            await world.clock.advance(3_000)
            assert world.task().version == 1

    asyncio.run(run())


# ----------------------------------------------------------------------------------------------------------- database


def test_a_database_that_breaks_while_running_gives_typed_refusals(tmp_path: Path) -> None:
    async def run() -> None:
        async with World(tmp_path / "data", log_level="error") as world:
            await world.submit()
            (device,) = await world.enrol(1)
            with sqlite3.connect(world.settings.database_path) as connection:
                connection.execute("alter table leases rename to gone")
            answer = await device.check_in()
            assert answer.refusal.reason == common_pb2.REFUSAL_REASON_UNAVAILABLE
            with sqlite3.connect(world.settings.database_path) as connection:
                connection.execute("alter table gone rename to leases")
            assert (await device.check_in()).HasField("assignment")

    asyncio.run(run())


def test_a_database_that_another_process_holds_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evensong.coordinator.database.BUSY_TIMEOUT_MS", 50)
    database = Database(f"sqlite:///{tmp_path / 'db'}")
    database.migrate()
    holder = sqlite3.connect(tmp_path / "db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="locked"), database.transaction():
        pass
    holder.close()
    with database.transaction():
        pass
    database.close()


def test_the_migrations_make_the_tables_that_the_code_knows(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'db'}")
    database.migrate()
    database.migrate()  # a second start changes nothing
    database.close()
    with create_engine(f"sqlite:///{tmp_path / 'db'}").connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []


def test_a_transaction_that_fails_leaves_nothing_and_runs_no_hook(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'db'}")
    database.migrate()
    told: list[str] = []
    row = {"token_id": "a", "secret_sha256": "b", "population": "c", "uses_left": 1, "expires_ms": 1}

    def fail_half_way() -> None:
        with database.transaction() as tx:
            tx.execute(tables.enrolment_tokens.insert().values(**row))
            tx.after_commit(lambda: told.append("told"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    with database.read() as tx:
        assert tx.execute(select(tables.enrolment_tokens)).all() == []
    assert told == []
    database.close()


# ------------------------------------------------------------------------------------------------------- blobs, spool


@pytest.mark.parametrize("url", ["folder", "memory://evensong-test"])
def test_blobs_come_back_by_their_hash(tmp_path: Path, url: str) -> None:
    store = BlobStore(str(tmp_path / url) if url == "folder" else url, tmp_path / "staging")
    sha256 = store.put(b"0123456789")
    assert store.put(b"0123456789") == sha256
    assert store.size(sha256) == 10 and store.size("0" * 64) is None
    assert store.read(sha256) == b"0123456789"
    assert store.read(sha256, 3, 4) == b"3456"
    assert not list((tmp_path / "staging").iterdir())


def test_a_damaged_blob_is_not_handed_out_as_whole(tmp_path: Path) -> None:
    store = BlobStore(str(tmp_path / "blobs"), tmp_path / "staging")
    sha256 = store.put(b"0123456789")
    (tmp_path / "blobs" / sha256[:2] / sha256).write_bytes(b"0123456780")
    with pytest.raises(StorageError, match="damaged"):
        store.read(sha256)


def test_an_upload_goes_on_after_a_restart_and_leftovers_are_swept(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    first.upload("wanted").append(b"abc")
    first.upload("leftover").append(b"xyz")
    again = Spool(tmp_path)
    again.keep_only({"wanted"})
    assert [path.name for path in tmp_path.iterdir()] == ["wanted"]
    upload = again.upload("wanted")
    assert (upload.received, upload.resumed) == (3, True)
    upload.append(b"def")
    whole = Spool(tmp_path / "other").upload("x")
    whole.append(b"abcdef")
    assert upload.sha256() == whole.sha256()
