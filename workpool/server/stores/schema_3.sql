-- Version 3 of the store: clients create environments and sessions of their own.
-- Columns of environment are the fields of Environment (environments.py), in their order.
-- session.agent: a JSON object with id and version. signing_key: one row, made with the file.

ALTER TABLE session ADD COLUMN title TEXT;
ALTER TABLE session ADD COLUMN agent TEXT;
ALTER TABLE session ADD COLUMN archived_at INTEGER;

CREATE TABLE environment (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL,
    description TEXT,
    metadata    TEXT NOT NULL, -- a JSON object of strings
    created_at  INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE signing_key (
    key BLOB NOT NULL
);
