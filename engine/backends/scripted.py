"""Answers without a model: for tests, dry runs and the first look at a configuration.

``ScriptedBackend`` goes through the same seam as the real ones. An answer is a pure function of the
prompt, so two runs over the same plan get the same text whatever the order; delays and faults come
from functions of the prompt and the number of the attempt, so a test can say which request fails
how often.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import anyio

from engine.backends.base import Failure, Verdict
from engine.backends.constraint import CONSTRAINT, schema_of
from engine.backends.made_up import made_up_json, sentences
from engine.languages import measure
from engine.records import Completion, Prompt, Usage

__all__ = ["ScriptedBackend", "alpaca_text", "fitting_text"]

Answer = Callable[[Prompt], str]
Delay = Callable[[Prompt], float]
Fault = Callable[[Prompt, int], Verdict | None]
"""What attempt 1, 2, … of a prompt comes to; None: its answer."""

VERBS = (
    "Describe Explain Outline Summarise Criticise Invent Compare Rewrite List Suggest Plan "
    "Propose Identify Estimate Defend Translate Classify Improve Design Review Compose Discuss "
    "Analyse Recommend Simplify Imagine Correct Evaluate Predict Interpret"
).split()
"""A record is one word of each list: verb, object, link, modifier, noun and tail. The lists are
long enough for near-duplicates to be the exception, and ``POPULAR`` makes them come."""
OBJECTS = (
    "a-short-story three-arguments the-main-causes a-polite-email two-alternatives "
    "a-weekly-schedule an-opening-paragraph five-interview-questions a-convincing-slogan "
    "the-likely-consequences a-tender-poem one-common-mistake a-balanced-budget "
    "an-honest-apology a-training-plan four-historical-examples the-necessary-steps "
    "a-bedtime-fable an-angry-review a-job-advert several-synonyms a-legal-objection "
    "the-hidden-assumptions a-brief-biography an-unusual-metaphor a-fair-compromise "
    "six-warning-signs a-dinner-menu the-strongest-evidence a-radio-announcement "
    "an-emergency-procedure a-simple-experiment two-opposing-views a-farewell-speech "
    "the-grammatical-errors a-travel-itinerary"
).split()
"""Hyphens hold a phrase together while the list is split; in the record they become spaces."""
LINKS = ("about concerning based-on inspired-by in-favour-of against related-to on").split()
MODIFIERS = (
    "medieval seasonal affordable underwater municipal neglected artificial edible volunteer "
    "coastal digital ancient nocturnal recycled competitive suburban solar endangered handmade "
    "statistical nomadic industrial imaginary diplomatic tropical wireless bilingual haunted "
    "organic elderly migratory wooden financial orbital vegetarian forgotten parliamentary "
    "veterinary classical portable"
).split()
NOUNS = (
    "gardening taxation bicycles lighthouses pottery vaccines glaciers libraries beekeeping "
    "railways sculpture insurance weddings orchards submarines astronomy fermentation bridges "
    "journalism chess earthquakes textiles swimming democracy carpentry proverbs fireworks "
    "irrigation opera kites archaeology nutrition windmills inheritance perfume sledges "
    "auctions calendars waterfalls cheese mathematics passports satellites tribunals umbrellas "
    "volcanoes debates harbours museums encryption tournaments compost translation hospitals "
    "lullabies vineyards"
).split()
"""What an instruction is about; drawn a second time for its input."""
TAILS = (
    "for-a-nervous-first-time-speaker without-using-any-numbers in-under-fifty-words "
    "as-a-lighthouse-keeper-would for-children-who-dislike-school with-one-surprising-fact "
    "from-the-buyer's-point-of-view before-the-deadline-on-Friday in-the-style-of-a-newsreader "
    "so-that-my-grandmother-agrees using-only-questions given-a-very-small-team "
    "and-rank-the-results for-readers-in-Nairobi while-staying-polite with-a-twist-at-the-end "
    "as-a-numbered-procedure for-somebody-moving-abroad and-justify-each-choice "
    "in-plain-everyday-words despite-heavy-rain for-a-village-of-two-hundred-people "
    "keeping-the-original-tone and-state-your-doubts in-the-year-2150 when-money-is-no-object "
    "for-an-audience-of-experts as-a-dialogue-between-rivals with-sources-to-check "
    "during-a-power-cut"
).split()
"""Conditions at the end of an instruction, and again at the end of its output."""
POPULAR = 1500
"""So many ideas come again and again, in one record of eight, as they do from a real model."""
TAG = re.compile(r"<(\w{1,40})>[^<]{0,40}</\1>")
"""A form of answer that a prompt names: ``<name>…</name>``."""
LABEL = re.compile(r"[Bb]egin your answer with \"([^\"\n]{1,40})\"")
"""What a prompt asks the answer to begin with: ``Begin your answer with "Yes"``."""
YES_OR_NO = "Is it classification?"
"""What the prompt of Self-Instruct's stage of classification ends with."""
OPEN_TASK = re.compile(r"^Output: .*^Task: [^\n]+\n\Z", re.MULTILINE | re.DOTALL)
"""What Self-Instruct's last two stages end with."""
BOX = "\\boxed{"
"""In a prompt, it asks for a final answer in LaTeX's box, as the recipe ``reason`` does."""
LIST = re.compile(r"\b(?:as|in) a (?:numbered |bulleted )?list\b", re.I)
"""A prompt that wants a list: "as a numbered list", "in a list"."""
ANY_OBJECT = {"type": "object", "properties": {"text": {"type": "string"}}}
"""The schema that stands in for one where a prompt asks for JSON and does not say of what form."""
OPEN_NUMBER = re.compile(r"(\d+)\. (?:Instruction:|指令：)\s*$")
"""The record that Alpaca's prompt leaves open at its end: ``4. Instruction:``."""

# The same for Chinese prompts; their records come in the labels that the prompt ends with.
ZH_VERBS = (
    "描述 解释 概括 批评 设想 比较 改写 列举 推荐 规划 归纳 估算 反驳 翻译 评价 改进 设计 审阅 "
    "创作 讨论 分析 简化 想象 纠正 预测 点评 说明 整理 拟定 回顾"
).split()
ZH_OBJECTS = (
    "一则短篇故事 三条论据 主要成因 一封客气的邮件 两种备选方案 每周日程表 开场白 五个面试问题 "
    "响亮的口号 可能的后果 一首小诗 常见的错误 收支预算 诚恳的道歉 训练步骤 四个历史事例 "
    "操作要领 睡前童话 愤怒的留言 招聘启事 近义词 法律意见 隐含的前提 人物小传 新奇的比喻 "
    "折中办法 六个危险信号 晚餐菜单 有力的证据 广播稿 应急流程 简易实验 对立的观点 告别致辞 "
    "语法毛病 旅行路线"
).split()
ZH_MODIFIERS = (
    "中世纪 应季 平价 水下 市立 荒废 人工 可食用 志愿 沿海 数字化 古代 夜间 再生 竞技 郊区 "
    "太阳能 濒危 手工 统计 游牧 工业 虚构 外交 热带 无线 双语 闹鬼 有机 老年 候鸟般 木制 金融 "
    "轨道 素食 被遗忘 议会 兽医 古典 便携"
).split()
ZH_NOUNS = (
    "园艺 税务 自行车 灯塔 陶器 疫苗 冰川 图书馆 养蜂 铁路 雕塑 保险 婚礼 果园 潜艇 天文 发酵 "
    "桥梁 新闻 象棋 地震 纺织 游泳 民主 木工 谚语 烟花 灌溉 歌剧 风筝 考古 营养 风车 遗产 香水 "
    "雪橇 拍卖 历法 瀑布 奶酪 数学 护照 卫星 法庭 雨伞 火山 辩论 港口 博物馆 密码 锦标赛 堆肥 "
    "医院 摇篮曲 葡萄园"
).split()
ZH_TAILS = (
    "写给初次登台的演讲者 全文不出现数字 控制在五十字内 模仿守塔人的口吻 让讨厌上学的孩子也爱看 "
    "加入一个意外的事实 站在买家的角度 赶在周五截止之前 像播报新闻那样 好让外婆点头同意 "
    "通篇只用问句 考虑到人手很少 最后排出名次 面向内罗毕的读者 始终保持礼貌 结尾来个反转 "
    "按步骤逐条编号 帮助即将移居国外的人 并为每项选择给出理由 尽量使用家常话 不顾外面的大雨 "
    "适合两百人的村庄 保留原来的语气 同时坦白自己的疑虑 背景设在二一五〇年 假如钱不成问题 "
    "对象是一群专家 写成对手之间的对话 附上可查的出处 发生在停电的夜晚"
).split()


def alpaca_text(prompt: str, *, seed: int | None = None, records: int = 3) -> str:
    """A continuation of Alpaca's prompt: ``records`` numbered records with input and output.

    Goes on after the open ``N. Instruction:`` at the prompt's end. A pure function.
    """
    opened = OPEN_NUMBER.search(prompt[-64:])
    number = int(opened[1]) if opened else 1
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    chinese = opened is not None and "指令" in opened[0]
    label, record = (" 指令：", _chinese_record) if chinese else (" Instruction:", _record)
    parts = []
    for position in range(number, number + records):
        bits = int.from_bytes(hashlib.sha256(digest + position.to_bytes(4, "big")).digest(), "big")
        head = f"{position}.{label}" if position > number or not opened else ""
        parts.append(f"{head}{'' if chinese else ' '}{record(bits, position)}")
    return "".join(parts)


def _record(bits: int, number: int) -> str:
    """One of some 10¹⁰ records, chosen by ``bits``."""
    parts = (VERBS, OBJECTS, LINKS, MODIFIERS, NOUNS, TAILS, NOUNS, TAILS)
    (verb, what, link, modifier, noun, tail, other, manner), bits = _words(bits, parts)
    given = f"Notes on {other}, {manner}." if bits % 5 < 2 else "<noinput>"
    return (
        f"{verb} {what} {link} {modifier} {noun} {tail}.\n{number}. Input:\n{given}\n"
        f"{number}. Output:\nStart with {what} and leave {other} for later. {noun.capitalize()} "
        f"that are {modifier} deserve care: {verb.lower()} them {manner}, then look again {tail}, "
        f"since most people think of {other} first.\n###\n"
    )


def _chinese_record(bits: int, number: int) -> str:
    """One of some 10⁹ Chinese records, chosen by ``bits``."""
    parts = (ZH_VERBS, ZH_OBJECTS, ZH_MODIFIERS, ZH_NOUNS, ZH_TAILS, ZH_NOUNS, ZH_TAILS)
    (verb, what, modifier, noun, tail, other, manner), bits = _words(bits, parts)
    given = f"关于{other}的笔记：{manner}。" if bits % 5 < 2 else "<无输入>"
    return (
        f"{verb}{modifier}{noun}的{what}，{tail}。\n{number}. 输入：\n{given}\n"
        f"{number}. 输出：\n先从{what}入手，{other}留到后面。{modifier}{noun}值得用心："
        f"{verb}的时候{manner}，然后再看一遍，因为多数人首先想到的是{other}。\n###\n"
    )


def _words(bits: int, parts: Sequence[Sequence[str]]) -> tuple[list[str], int]:
    """A word of each part, chosen by ``bits``, and the bits that are left."""
    if bits % 8 == 0:
        popular = (bits // 8) % POPULAR
        bits = int.from_bytes(hashlib.sha256(popular.to_bytes(4, "big")).digest(), "big")
    words = []
    for choices in parts:
        bits, which = divmod(bits, len(choices))
        words.append(choices[which].replace("-", " "))
    return words, bits


def fitting_text(asked: str, *, seed: int | None = None, form: Any = None, records: int = 3) -> str:
    """What a willing model might answer: JSON where a schema asks for it, a longer list where
    Alpaca's prompt begins one, what Self-Instruct's stages ask for, a boxed number or tags that the
    prompt names, a list where it asks for one, else plain sentences behind the label that it asks
    for. A pure function.

    Args:
        asked: the prompt, all of its turns.
        form: the request's ``response_format``.
        records: of a list.
    """
    if (schema := schema_of({CONSTRAINT: form})) is not None:
        return made_up_json(schema, seed, asked)
    if isinstance(form, dict) and form.get("type") == "json_object":
        return made_up_json(ANY_OBJECT, seed, asked)
    if OPEN_NUMBER.search(asked[-64:]):
        return alpaca_text(asked, seed=seed, records=records)
    if asked.endswith(YES_OR_NO):
        return " No"
    if OPEN_TASK.search(asked):
        return f"Output: {sentences(seed, asked)}"
    if BOX in asked:
        return f"{sentences(seed, asked)} {BOX}{len(asked) % 9}}}"
    if tags := dict.fromkeys(TAG.findall(asked)):
        return "".join(f"<{name}>{sentences(seed, asked, name)}</{name}>\n" for name in tags)
    if LIST.search(asked):
        items = (sentences(seed, asked, n, count=1) for n in range(1, records + 1))
        return "\n".join(f"{n}. {item}" for n, item in enumerate(items, 1))
    label = LABEL.search(asked)
    return f"{label[1]} {sentences(seed, asked)}" if label else sentences(seed, asked)


def _fitting(prompt: Prompt) -> str:
    asked = "\n".join(turn.content for turn in prompt.chat)
    sampling = prompt.sampling
    return fitting_text(asked, seed=sampling.seed, form=sampling.extra.get(CONSTRAINT))


class ScriptedBackend:
    """See ``engine.backends.base.Backend``.

    ``answer`` gives the text, ``delay_s`` how long a call takes, ``fault`` what goes wrong.
    """

    def __init__(
        self,
        answer: Answer = _fitting,
        *,
        name: str = "scripted",
        model: str = "scripted",
        delay_s: float | Delay = 0.0,
        fault: Fault | None = None,
        context_length: int | None = 4096,
        max_in_flight: int | None = 64,
    ) -> None:
        self.name = name
        self.model = model
        self.context_length = context_length
        self.max_in_flight = max_in_flight
        self.calls: Counter[int] = Counter()
        """Attempts of each prompt, by its index."""
        self._answer = answer
        self._delay_s = delay_s
        self._fault = fault

    async def start(self) -> None:
        """Nothing to load."""

    async def complete(self, prompts: Sequence[Prompt]) -> list[Completion | BaseException]:
        delay_s = self._delay_s
        wait_s = max(map(delay_s, prompts)) if callable(delay_s) else delay_s
        await anyio.sleep(wait_s)
        return [self._one(prompt, wait_s) for prompt in prompts]

    def _one(self, prompt: Prompt, latency_s: float) -> Completion | BaseException:
        self.calls[prompt.index] += 1
        verdict = self._fault(prompt, self.calls[prompt.index]) if self._fault else None
        if verdict is not None:
            return Failure(verdict)
        text = self._answer(prompt)
        return Completion(
            text=text,
            finish_reason="stop",
            usage=Usage(
                prompt_tokens=sum(_count(turn.content) for turn in prompt.chat),
                completion_tokens=_count(text),
            ),
            model=self.model,
            latency_s=latency_s,
        )

    async def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        return [_count(text) for text in texts]

    async def aclose(self) -> None:
        """Nothing to release."""


def _count(text: str) -> int:
    """Words, or characters without spaces: good enough for a model that does not exist."""
    return measure(text)[0]
