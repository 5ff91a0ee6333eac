"""Which jobs a piece of work needs, in which order, and what becomes of their outputs.

A flow is a generator: it yields the jobs that may run side by side, is resumed when they are done, and returns the result.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from acestep.adjust import over_plan, refusal, unique
from acestep.condition_texts import MAX_TEXT_TOKENS, caption_text
from acestep.errors import InvalidOutput, InvalidRequest, LimitExceeded
from acestep.lm.adapters import PlannerAdapters
from acestep.lm.grammar import MAX_CAPTION_TOKENS, CodesProgram, CotProgram, Grammar, OpenProgram
from acestep.lm.job import Job
from acestep.lm.metadata import (
    LYRICS_WORDS,
    degenerate,
    known_fields,
    metadata_of,
    parse_lyrics,
    parse_reasoning,
    printable,
    unquote,
)
from acestep.lm.prompts import PromptBuilder
from acestep.lm.sampling import SamplingParams
from acestep.lm.scores import scored
from acestep.lm.weighing import WeighingJob
from acestep.lm.work import FormatWork, InspireWork, PlannerWork, PlanWork, Sample, TextWork, UnderstandWork
from acestep.plan import CODES_PER_SECOND, Adjustment, Metadata, Plan, UsedLora
from acestep.request import INSTRUMENTAL, MAX_DURATION_S, MAX_SEED, MIN_DURATION_S, SongRequest
from acestep.tasks import RULES, instruction
from acestep.words import is_instrumental

Flow = Generator[Sequence[Job | WeighingJob], None, Plan | Sample]

UNDERSTAND_TOKENS, WRITE_TOKENS = 4_096, 2_048  # most new tokens of understand, and of inspire and format

CODES_STREAM, METADATA_STREAM = 0, 1  # noise streams, so that both phases can share a seed
_LEAST_CAPTION_TOKENS = 32  # a shorter one is not worth a refusal less
_BLOCK_TOKENS = 17  # tags and line ends around the fields, and the end of the turn
_SHOWN_CHARS = 80  # of a caption in a warning
_RENDER_GROWTH = 1.3  # a caption rendered as YAML has more tokens than as it was drawn: folds and quotes


@dataclass(frozen=True)
class FlowBuilder:
    """Makes flows for one model.

    Attributes:
        max_len: Tokens that one row may have.
        max_rows_per_job, max_tokens_per_job: Rows, and tokens of keys and values, that one job may take; more outputs become more
            jobs.
        adapters: Loads what `lm_lora` of a request names.
    """

    grammar: Grammar
    prompts: PromptBuilder
    max_len: int
    max_rows_per_job: int
    max_tokens_per_job: int
    adapters: PlannerAdapters | None = None

    def flow(self, work: PlannerWork) -> Flow:
        return self._adapted(work) if isinstance(work, PlanWork) else self._sample(work)

    # -- songs

    def _adapted(self, work: PlanWork) -> Flow:
        """A plan whose jobs run with the adapters that its request names."""
        adapters = self.adapters.get(work.request.lm_lora) if self.adapters is not None else None
        jobs_of, used = self._plan(work), False
        while True:
            try:
                jobs = next(jobs_of)
            except StopIteration as end:
                plan: Plan = end.value
                loras = tuple(UsedLora(**one) for one in adapters.active.as_settings()) if adapters and used else ()
                return plan.model_copy(update={"lm_lora": loras}) if used else plan
            for job in jobs:
                if isinstance(job, Job):  # scores are the plain planner's, to be compared
                    job.adapters, used = adapters, True
            yield jobs

    def _plan(self, work: PlanWork) -> Flow:
        request, _ = over_plan(work.request)
        limit = _longest(work)
        seeds = request.codes_seeds
        thinks = request.thinking and RULES[request.task].codes and request.audio_codes is None
        uncond = self._unconditional(work) if thinks and request.lm_cfg_scale > 1.0 else None
        edited = request.plan
        told: list[Adjustment] = []
        if edited is not None:
            if edited.codes or not thinks:
                return edited if request.audio_codes is None else _with_codes(edited, request.audio_codes)
            metadata = [edited.metadata_of(i) for i in range(request.batch_size)]
            shared = not edited.item_metadata
        else:
            written = yield from self._metadata(request, limit, thinks, len(uncond or ()))
            metadata, told = _without_degenerate(written)
            if request.strict and told:
                raise refusal(told[0])
            shared = request.lm_share_cot
        result = Plan(
            metadata=metadata[0],
            item_metadata=() if shared else tuple(metadata),
            lm_seeds=seeds,
            adjustments=tuple(told),
        )
        if request.audio_codes is not None:
            return _with_codes(result, request.audio_codes)
        if not thinks:
            return result
        codes = yield from self._codes(request, metadata, limit, seeds, uncond)
        result = result.model_copy(update={"codes": codes})
        if request.duration is None and not request.constrained_decoding:  # it may have ended early
            metadata = [_as_coded(m, c) for m, c in zip(metadata, codes, strict=True)]
            shared = shared and len(set(metadata)) == 1
            own = () if shared else tuple(metadata)
            result = result.model_copy(update={"metadata": metadata[0], "item_metadata": own})
        return (yield from scored(self.prompts, request, result, self.max_len)) if request.score else result

    def _metadata(
        self, request: SongRequest, limit: float, thinks: bool, uncond: int
    ) -> Generator[list[Job], None, list[Metadata]]:
        """Phase 1, once per request or once per item."""
        duration = min(request.duration, limit) if request.duration is not None else None
        if duration is None and request.audio_codes is not None:
            duration = len(request.audio_codes) / CODES_PER_SECOND
        given = Metadata(
            bpm=request.bpm, duration=duration, keyscale=request.key_scale, timesignature=request.time_signature,
            language=None if request.vocal_language == "unknown" else request.vocal_language,
        )  # fmt: skip
        complete = None not in (given.bpm, given.keyscale, given.timesignature, given.duration)
        if not request.use_cot_metas or complete or not RULES[request.task].metadata:
            return [given] * request.batch_size
        known = known_fields(given.model_dump(exclude={"caption"}), limit)
        prompt = self.prompts.plan(request.prompt, _lyrics(request))
        caption_tokens, limit = self._caption_room(
            request, max(len(prompt), uncond), duration if thinks else 0.0, limit
        )
        params = _music_params(request, cfg=False)
        outputs: list[tuple[CotProgram | OpenProgram, int]] = [
            (
                self.grammar.plan(
                    known, max_duration=int(limit), caption_tokens=caption_tokens, language=request.use_cot_language
                )
                if request.constrained_decoding
                else self._open(len(prompt), MAX_CAPTION_TOKENS * 2, reasoning_only=True),
                seed,
            )
            for seed in request.metadata_seeds[: 1 if request.lm_share_cot else None]
        ]
        yield self._jobs(prompt, None, outputs, params, METADATA_STREAM)
        found = [self._read_metadata(program, limit, given) for program, _ in outputs]
        return found if not request.lm_share_cot else found * request.batch_size

    def _caption_room(
        self, request: SongRequest, prompt: int, duration: float | None, limit: float
    ) -> tuple[int, float]:
        """Caption tokens and seconds that leave room for the codes in `max_len`. A `duration` of None is the planner's to decide."""
        fields = self.grammar.plan({}, max_duration=int(MAX_DURATION_S), caption_tokens=0).max_tokens
        wanted = self._longest_caption(request) if request.use_cot_caption else 0
        least = int(min(wanted, _LEAST_CAPTION_TOKENS) * _RENDER_GROWTH)
        codes = int((MIN_DURATION_S if duration is None else duration) * CODES_PER_SECOND)
        fixed = prompt + fields + _BLOCK_TOKENS
        if fixed + least + codes > self.max_len:
            raise self._too_long(fixed + least + codes, prompt, codes / CODES_PER_SECOND)
        room = self.max_len - fixed
        if duration is None:  # where there is little, a caption takes no more than half of it
            caption = min(int(wanted * _RENDER_GROWTH), max(least, min(room // 2, room - codes)))
            limit = min(limit, (room - caption) // CODES_PER_SECOND)
        else:
            caption = room - codes
        return min(wanted, int(caption / _RENDER_GROWTH)), limit

    def _longest_caption(self, request: SongRequest) -> int:
        """Tokens; where the request is strict, no more than the renderer reads beside what else its text holds."""
        if not request.strict:
            return MAX_CAPTION_TOKENS
        rest = Metadata(bpm=300, keyscale="A# minor", timesignature="4")
        plain = request.model_copy(update={"prompt": ""})
        codes = request.thinking or request.audio_codes is not None
        text = caption_text(plain, rest, instruction(request, codes=codes), MAX_DURATION_S)
        return max(1, min(MAX_CAPTION_TOKENS, MAX_TEXT_TOKENS - len(self.grammar.tokenizer.encode(text))))

    def _codes(
        self,
        request: SongRequest,
        metadata: list[Metadata],
        limit: float,
        seeds: tuple[int, ...],
        uncond: list[int] | None,
    ) -> Generator[list[Job], None, tuple[tuple[int, ...], ...]]:
        """Phase 2: all items side by side; items with the same metadata share their prompt."""
        lyrics = _lyrics(request)
        params = _music_params(request, cfg=uncond is not None)
        jobs: list[Job] = []
        programs: dict[int, CodesProgram | OpenProgram] = {}
        for same in dict.fromkeys(metadata):
            prompt = self.prompts.codes(request.prompt, lyrics, same)
            if len(prompt) + (_code_count(same, limit) or 1) + 1 > self.max_len:
                # A caption that grew in YAML more than was reckoned with, or a plan's; the renderer has it all the same.
                prompt = self.prompts.codes(request.prompt, lyrics, same.model_copy(update={"caption": None}))
            items = [i for i, m in enumerate(metadata) if m == same]
            for i in items:
                programs[i] = self._codes_program(request, same, limit, max(len(prompt), len(uncond or ())))
            jobs += self._jobs(prompt, uncond, [(programs[i], seeds[i]) for i in items], params, CODES_STREAM)
        yield jobs
        return tuple(self._read_codes(programs[i], m, limit) for i, m in enumerate(metadata))

    def _unconditional(self, work: PlanWork) -> list[int]:
        request = work.request
        if work.legacy_cfg_prompt:
            return self.prompts.codes_unconditional_legacy(request.prompt, _lyrics(request), request.lm_negative_prompt)
        return self.prompts.codes_unconditional(request.lm_negative_prompt)

    def _codes_program(
        self, request: SongRequest, metadata: Metadata, limit: float, prompt: int
    ) -> CodesProgram | OpenProgram:
        count = _code_count(metadata, limit)
        if prompt + (count or 1) + 1 > self.max_len:
            raise self._too_long(prompt + (count or 1) + 1, prompt, metadata.duration)
        most = min(int(limit * CODES_PER_SECOND), self.max_len - prompt - 1)
        if not request.constrained_decoding:
            return self._open(prompt, min((count or most) + 10, self.max_len - prompt - 1))
        return CodesProgram(self.grammar.tokenizer, count, limit=most)

    def _read_codes(self, program: CodesProgram | OpenProgram, metadata: Metadata, limit: float) -> tuple[int, ...]:
        if isinstance(program, CodesProgram):
            return tuple(program.codes)
        t = self.grammar.tokenizer
        codes = [id - t.first_code for id in program.ids if t.first_code <= id < t.first_code + t.num_codes]
        codes = codes[: _code_count(metadata, limit) or int(limit * CODES_PER_SECOND)]
        if not codes:
            raise InvalidOutput(
                "without grammar the planner wrote no audio codes; try another seed or leave constrained_decoding on",
                field="constrained_decoding",
            )
        return tuple(codes)

    # -- descriptions

    def _sample(self, work: TextWork) -> Flow:
        instrumental = False
        given: dict[str, object] = {}
        params, seed = _text_params(work), secrets.randbelow(2**31) if work.seed is None else work.seed
        match work:
            case UnderstandWork():
                self._check_codes(work.codes)
                prompt, most = self.prompts.understand(work.codes), UNDERSTAND_TOKENS
            case InspireWork():
                prompt, most = self.prompts.inspire(work.query, instrumental=work.instrumental), WRITE_TOKENS
                instrumental = work.instrumental
                given = {"language": work.vocal_language}
            case FormatWork():
                prompt, most = self.prompts.format(work.caption, work.lyrics), WRITE_TOKENS
                given = {
                    "bpm": work.bpm, "duration": work.duration, "keyscale": work.keyscale,
                    "language": work.language, "timesignature": work.timesignature,
                }  # fmt: skip
        limit = _longest(work)
        known = known_fields(given, limit)
        most = min(most, self.max_len - 64 - len(prompt))
        block = self.grammar.plan({}, max_duration=int(limit), caption_tokens=MAX_CAPTION_TOKENS).max_tokens
        if most <= block:
            raise self._too_long(len(prompt) + block + 64, len(prompt), None)
        program: CotProgram | OpenProgram = (
            self.grammar.plan(known, max_duration=int(limit), lyrics_tokens=most - block)
            if work.constrained_decoding
            else self._open(len(prompt), most)
        )
        yield self._jobs(prompt, None, [(program, seed)], params, METADATA_STREAM)
        metadata = self._read_metadata(program, limit, metadata_of({**known, "duration": given.get("duration")}, limit))
        lyrics = self._read_lyrics(program)
        faults = {"caption": degenerate(metadata.caption or ""), "lyrics": degenerate(lyrics, LYRICS_WORDS)}
        for name, fault in faults.items():
            if fault is not None:
                raise InvalidOutput(
                    f"{name}: what the planner wrote {fault}; another seed may write a better one", field=name
                )
        if not lyrics and isinstance(work, FormatWork):
            lyrics = work.lyrics
        if not lyrics and instrumental:
            lyrics = INSTRUMENTAL
        return Sample(
            **metadata.model_dump(),
            lyrics=lyrics,
            instrumental=instrumental or is_instrumental(lyrics),
            seed=seed,
        )

    # -- shared

    def _jobs(
        self,
        prompt: list[int],
        uncond: list[int] | None,
        outputs: list[tuple[CotProgram | OpenProgram, int]] | list[tuple[CodesProgram | OpenProgram, int]],
        params: SamplingParams,
        stream: int,
    ) -> list[Job]:
        prompts = [prompt] if uncond is None else [prompt, uncond]
        longest = max(program.max_tokens for program, _ in outputs)
        tokens = sum(len(p) + longest for p in prompts)
        per_job = max(1, min(self.max_rows_per_job // len(prompts), self.max_tokens_per_job // tokens))
        return [
            Job(prompt, uncond, outputs[i : i + per_job], params, stream=stream)
            for i in range(0, len(outputs), per_job)
        ]

    def _open(self, prompt: int, limit: int, *, reasoning_only: bool = False) -> OpenProgram:
        t = self.grammar.tokenizer
        stop = [t.eos, t.pad, *([t.end_think] if reasoning_only else [])]
        return OpenProgram(stop, limit=min(limit, self.max_len - prompt - 1))

    def _read_metadata(self, program: CotProgram | OpenProgram, limit: float, given: Metadata) -> Metadata:
        """What was written, under what the caller gave."""
        if isinstance(program, CotProgram):
            caption = unquote(self._text(program.caption_ids))
            found = metadata_of({**program.values, "caption": caption}, limit)
        else:
            found = metadata_of(parse_reasoning(self._text(program.ids)), limit)
        return found.model_copy(update=given.model_dump(exclude_none=True))

    def _read_lyrics(self, program: CotProgram | OpenProgram) -> str:
        if isinstance(program, CotProgram):
            return parse_lyrics("</think>" + self._text(program.lyrics_ids))
        return parse_lyrics(self._text(program.ids))

    def _text(self, ids: list[int]) -> str:
        # A limit may cut within a character: its half at the very end is left out.
        return printable(self.grammar.tokenizer.decode(ids)).removesuffix("\ufffd")

    def _check_codes(self, codes: Sequence[int]) -> None:
        known = self.grammar.tokenizer.num_codes
        bad = [n for n in codes if not 0 <= n < known]
        if bad:
            raise InvalidRequest(
                f"audio code {bad[0]} is outside 0 to {known - 1}, which this planner knows", field="codes"
            )

    def _too_long(self, needed: int, prompt: int, duration: float | None) -> LimitExceeded:
        seconds = f" and {duration:g} s of codes" if duration else ""
        return LimitExceeded(
            f"the prompt of {prompt} tokens{seconds} needs {needed} tokens; this planner has {self.max_len}. "
            "Shorten the lyrics or the prompt, or ask for a shorter song.",
            field="lyrics", limit=self.max_len, asked=needed, prompt_tokens=prompt,
        )  # fmt: skip


def _without_degenerate(written: list[Metadata]) -> tuple[list[Metadata], list[Adjustment]]:
    """Metadata without degenerate captions (the renderer then reads the caller's prompt), and what there is to say of them."""
    told, kept = [], []
    for metadata in written:
        caption = metadata.caption
        if caption is not None and (fault := degenerate(caption)):
            reason = f"the planner's caption {fault}, and the prompt is used; another seed may write a better one"
            told.append(Adjustment(field="plan.metadata.caption", asked=_beginning(caption), given=None, reason=reason))
            metadata = metadata.model_copy(update={"caption": None})
        kept.append(metadata)
    return kept, unique(told)


def _beginning(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def _longest(work: PlannerWork) -> float:
    """Seconds that a song may have."""
    return max(MIN_DURATION_S, min(work.max_duration, MAX_DURATION_S))


def _code_count(metadata: Metadata, limit: float) -> int | None:
    if metadata.duration is None:
        return None
    return max(1, int(min(metadata.duration, limit) * CODES_PER_SECOND))


def _as_coded(metadata: Metadata, codes: Sequence[int]) -> Metadata:
    """A song is as long as what was written of it."""
    if metadata.duration is None or len(codes) >= int(metadata.duration * CODES_PER_SECOND):
        return metadata
    return metadata.model_copy(update={"duration": len(codes) / CODES_PER_SECOND})


def _with_codes(plan: Plan, codes: tuple[int, ...]) -> Plan:
    return plan.model_copy(update={"codes": (codes,)})


def _lyrics(request: SongRequest) -> str:
    return INSTRUMENTAL if request.instrumental else request.lyrics


def _music_params(request: SongRequest, *, cfg: bool) -> SamplingParams:
    return SamplingParams(
        temperature=request.lm_temperature,
        top_k=request.lm_top_k,
        top_p=request.lm_top_p,
        repetition_penalty=request.lm_repetition_penalty,
        cfg_scale=request.lm_cfg_scale if cfg else 1.0,
    )


def _text_params(work: TextWork) -> SamplingParams:
    """Checked here: what is drawn in one batch with other callers' songs must not fail there."""
    for field, value, low, high in (
        ("temperature", work.temperature, 0.0, 2.0),
        ("top_k", work.top_k, 0, 1_000_000),
        ("top_p", work.top_p, 0.0, 1.0),
        ("seed", work.seed or 0, 0, MAX_SEED),
    ):
        if not low <= value <= high:
            raise InvalidRequest(f"{field}: {value} is outside {low} to {high}", field=field)
    return SamplingParams(temperature=work.temperature, top_k=work.top_k, top_p=work.top_p)
