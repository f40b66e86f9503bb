-- Version 2 of the store: sessions have events, and may be scripted.
-- session.script: a JSON list of tool uses. event.value: a JSON object, as the wire shows it.

ALTER TABLE session ADD COLUMN script TEXT;

CREATE TABLE event (
    id         TEXT PRIMARY KEY,
    session_id TEXT NOT NULL REFERENCES session (id),
    value      TEXT NOT NULL
) WITHOUT ROWID;
