-- Version 1 of the store (PRAGMA user_version). Times are microseconds since the epoch, UTC.
-- Columns are the fields of Item (stored_item.py) and StoredSession (stored_session.py), in their order.

CREATE TABLE session (
    id             TEXT PRIMARY KEY,
    environment_id TEXT NOT NULL,
    metadata       TEXT NOT NULL, -- a JSON object of strings
    created_at     INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE work (
    id                TEXT PRIMARY KEY,
    environment_id    TEXT NOT NULL,
    session_id        TEXT NOT NULL REFERENCES session (id),
    created_at        INTEGER NOT NULL,
    type              TEXT NOT NULL,
    state             TEXT NOT NULL
                      CHECK (state IN ('queued', 'starting', 'active', 'stopping', 'stopped')),
    metadata          TEXT NOT NULL, -- a JSON object of strings
    acknowledged_at   INTEGER,
    started_at        INTEGER,
    heartbeat_at      INTEGER,
    stop_requested_at INTEGER,
    stopped_at        INTEGER,
    holder            TEXT,
    delivered_at      INTEGER,
    lease_end         INTEGER,
    ttl_seconds       INTEGER NOT NULL,
    beaten            INTEGER NOT NULL -- 0 or 1
) WITHOUT ROWID;
