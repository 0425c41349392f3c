"""Table of stored texts: only there is what a session has written, and only where an edge's settings say so."""

from datetime import datetime

from sqlalchemy import ForeignKeyConstraint, Index
from sqlalchemy.orm import Mapped, mapped_column

from fleet_edge.store.models.base import Base


class TextRow(Base):
    """A piece of a text, from token `start` on; goes with its segment.

    `kinds` has a character for each token (`fleet_edge.store.token_kinds`), `ids` their ids with commas, `pieces` their
    bytes in hexadecimal with commas. Where only a hash is stored it is of the whole text up to the end of this piece.
    """

    __tablename__ = "texts"
    __table_args__ = (
        ForeignKeyConstraint(["session", "segment"], ["segments.session", "segments.segment"], ondelete="CASCADE"),
        Index(None, "at"),
    )

    session: Mapped[str] = mapped_column(primary_key=True)
    segment: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    start: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kinds: Mapped[str]
    ids: Mapped[str | None]
    pieces: Mapped[str | None]
    hash: Mapped[str | None]
    at: Mapped[datetime]
