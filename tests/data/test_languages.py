"""Heuristics in many languages: ordinary requests stay as their English twins do, whatever Python and spelling."""

# ruff: noqa: E501 - a line of East Asian or Indic text cannot be told short by its columns

from __future__ import annotations

import hashlib
import json
import unicodedata

import pytest

from compress.data.characters import fold, kind, normal, quoted, script
from compress.data.rows import chat_row
from compress.data.selection.heuristic_rules import judge, judge_text
from compress.data.selection.params import HeuristicsParams
from compress.data.selection.word_shapes import is_odd_word
from compress.data.words import count_words, words

# language -> ordinary short requests and answers, parted by bars
REQUESTS = {
    "Chinese": "你好！|好|停|嗯。|开灯|开灯。|关灯!谢谢|明天8点30分叫我|打开wifi|买2个苹果|第3章|播放《月亮》|他说：“好的。”|哈哈哈哈哈哈|"
    "iPhone15手机多少钱？|3+4等于几？|请关掉灯,打开空调(26度)|谢谢❤️|👍好的|你好~|再见👋🏽|嗨…|把PPT第5页的title改成Q3",
    "Japanese": "やあ！|はい。|はい～|うん|電気をつけて。|アラーム|明日の朝7時に起こして|えーーー|ありがとう♪|わーい！！|「はい」|30%にして|ｱﾗｰﾑ|了解です🙏✨",
    "Korean": "네|왜?|안녕!|불 꺼|3시30분 알람|7시30분에 깨워줘|왜 또 안 돼 응|ㅋㅋㅋㅋㅋㅋ|제3장|고마워요❤|TV를 켜줘",
    "Hindi": "नमस्ते।|हाँ।|बत्ती बंद करो|धन्यवाद 🙏|कल सुबह ७ बजे जगाना|क्या?|जी|शुभ रात्रि!",
    "Thai, Lao, Khmer, Burmese, Tibetan": "สวัสดี|เปิดไฟ|ใช่|ตั้งปลุก7โมง|ไม่|ສະບາຍດີ|សួស្តី|မင်္ဂလာပါ|བཀྲ་ཤིས་བདེ་ལེགས།",
    "Arabic, Persian, Urdu": "مرحبا!|شكراً|نعم،|كيف حالك؟|أطفئ الضوء|می‌خواهم بخوابم|سلام|ہاں۔|٧:٣٠ منبه|لا",
    "Hebrew": "שלום!|כן|מה שלומך?|שָׁלוֹם|תודה רבה ❤|צה״ל|ב־7:30",
    "Others": "ተኛ|ሰላም።|გამარჯობა|გვფრცქვნი|Բարև։|Γειά!|Ναι.|Привет!|Да.|взбзднуть|напомни в 7ч30м|спс",
    "Spanish": "¡Hola!|¿Qué?|¡Sí!|¡¿Cómo?!|enciende la luz",
    "German": "Rechtsschutz Angstschweiß|Rechtsschreibung|Geschäftsführerin|Geschwindigkeitsbegrenzung|Herbststurm|Landstraße|"
    "Kraftfahrzeughaftpflichtversicherung|Kunststoff|Selbstschutz|Impfpflicht|Liebe Schüler*innen|Arztpraxis|Wurstbrot|„Licht“ an",
    "Czech": "zmrzlina čtvrtek|zmrzlina|čtvrthodina|prst|smrt|strč prst skrz krk|vlk|ctvrtek|scvrkl se|skrz|mrkl",
    "Polish": "źdźbło|chrząszcz|Szczęście|bezwzględny|wstrząs|zmarszczka|następstwo|szczkawka",
    "Dutch, Swedish, Finnish, Hungarian": "herfststorm|angstschreeuw|världsstjärna|lentokonesuihkuturbiini|megszentségteleníthetetlen",
    "Vietnamese": "cảm ơn|tắt đèn|Tạm biệt!|đặt báo thức 7h30",
    "Croatian, Welsh, Turkish": "crkva|strpljenje|vrh brda|drws|bwrdd|noswaith dda|ışık aç",
    "French, Portuguese": "à 7h30|réveil 7h30|l'été|œuf|AMANHÃ|«NÃO»|Ação|coração",
    "English": "Hi!|no|nightstand on|Knightsbridge|catchphrase|matchstick|birthplace|eighths|page one\fpage two|a\vb c|co\xadop",
    "emoji": "thank you 🩷|oh 🫨|so tired 🫩|I ❤️ u|hi 👨‍👩‍👧‍👦|hello 🇩🇪|ok 1️⃣|great 🏴󠁧󠁢󠁥󠁮󠁧󠁿|love it 🫶🏾🫶🏾|ok ✅|done 🪾",
    "signs": "€5 please|₹500 pay|20°C heat|½ cup|m² room|50‰ mix|—no—|‹ja›",
}  # fmt: skip
FREEDOM = {
    "Chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。人人有资格享受本宣言所载的一切权利和自由。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았으며 서로 "
    "형제애의 정신으로 행동하여야 한다. 모든 사람은 인종, 피부색, 성, 언어, 종교 등 어떠한 종류의 차별이 없이 이 선언에 규정된 모든 "
    "권리와 자유를 향유할 자격이 있다.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है "
    "और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ",
    "Tamil": "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும், உரிமைகளிலும் சமமானவர்கள்.",
}


@pytest.mark.parametrize("form", [None, "NFD", "NFKD"])
@pytest.mark.parametrize("language", REQUESTS)
def test_ordinary_requests_stay(language: str, form: str | None) -> None:
    for given in REQUESTS[language].split("|"):
        text = given if form is None else unicodedata.normalize(form, given)  # type: ignore[arg-type]
        assert judge(chat_row(text, text), HeuristicsParams()) is None, text


@pytest.mark.parametrize("language", FREEDOM)
def test_documents_stay_and_count_words(language: str) -> None:
    text = FREEDOM[language]
    assert judge_text(text, HeuristicsParams(min_words=8)) is None
    assert judge_text(unicodedata.normalize("NFD", text), HeuristicsParams(min_words=8)) is None


def test_junk_goes_in_any_script() -> None:
    for text, reason in {
        FREEDOM["Chinese"] * 2: "repeated passages",
        FREEDOM["Korean"] * 2: "repeated passages",
        "天" * 12: "repeated character",
        "пока " * 5: "repeated word",
        "\ue000 лампа": "unreadable characters",
        "лампа \x85": "unreadable characters",
        "le cafÃ©": "unreadable characters",
        "♪♪★ 好": "too many symbols",
        "lighhts asdfgh": "odd words",
        "l#mp€ свет": "odd words",
    }.items():
        found = judge_text(text, HeuristicsParams())
        assert found is not None, text
        assert found.reason == reason, text


@pytest.mark.parametrize(
    "word", ["ghhts", "asdfgh", "brtzk", "qwrtp", "zxcvbn", "fghjk", "dfghj", "qwrt", "lkjhg", "1a2"]
)
def test_keyboards_are_no_language(word: str) -> None:
    assert is_odd_word(word)


@pytest.mark.parametrize(
    ("text", "tone", "hits"),
    [
        ("你这个笨蛋！", ["笨蛋"], True),
        ("गधा है", ["गध"], False),
        ("तू गधा है", ["गधा"], True),
        ("дурачок", ["дурак"], False),
        ("ты ДУРАААК", ["дурак"], True),
        ("idiote\u0301", ["idioté"], True),
        ("my class", ["ass"], False),
    ],
)
def test_tone_in_any_script(text: str, tone: list[str], hits: bool) -> None:
    assert (judge_text(text, HeuristicsParams(tone=tone)) is not None) == hits


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("กิน ok", ["กิ", "น", "ok"]),
        ("cafe\u0301 Éte\u0301", ["café", "été"]),
        ("क्षत्रिय!", ["क्षत्रिय"]),
        ("한국어 말", ["한국어", "말"]),
        ("开灯ok2", ["开", "灯", "ok2"]),
        ("a\u0378b", ["a\u0378b"]),
    ],
)
def test_words_of_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_counted_words() -> None:
    assert [
        count_words(t) for t in ("lights", "开灯", "今天天气怎么样？", "打开wifi", "はい", "สวัสดี", "안녕하세요")
    ] == [1, 2, 5, 3, 1, 2, 1]


def test_characters_are_of_the_same_kind_under_every_python() -> None:
    """The digest was taken under Python 3.11, 3.12 and 3.13, whose Unicode is 14, 15 and 15.1."""
    digest = hashlib.sha256()
    for code in (*range(0x3400), *range(0xA000, 0xAC00, 3), *range(0xF900, 0x20000, 7), *range(0x20000, 0x110000, 997)):
        if not 0xD800 <= code < 0xE000:
            char = chr(code)
            found = (kind(char), script(char), fold(char), words(f"a{char}b {char}A"), normal(f"e{char}"), quoted(char))
            digest.update(json.dumps(found).encode())
    assert digest.hexdigest()[:16] == "aa38d76eaaec0cac"
    assert {char: kind(char) for char in "\U0001fae9\U0001fa77\U0001e030\U00016d40\uffff\ue000\u0897\u20c0"} == {
        "\U0001fae9": "symbol", "\U0001fa77": "symbol", "\U0001e030": "letter", "\U00016d40": "letter",
        "\uffff": "unreadable", "\ue000": "unreadable", "\u0897": "letter", "\u20c0": "punctuation",
    }  # fmt: skip
    assert [script(char) for char in "aяé中한ẞ\U0001e030\u2c6d"] == [
        "LATIN", "CYRILLIC", "LATIN", "CJK", "HANGUL", "LATIN", "CYRILLIC", "LATIN",
    ]  # fmt: skip
