// A memory and a host around the simulated core. usage: simulation PROGRAM IMAGE LOGITS LATENCY WORDS CYCLES
// PROGRAM: pairs of 32-bit address and word. IMAGE: the memory. LOGITS: file to append the logits to, or "".
// The memory answers after LATENCY cycles, and gives at most WORDS words in CYCLES cycles.
// Each line of the input is a token; each line of the output its cycles and the next token.
#include "core.cc"
#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

static std::vector<char> contents(const char *path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

int main(int count, char **arguments) {
    if (count != 7) return 1;
    auto program = contents(arguments[1]), memory = contents(arguments[2]);
    FILE *logits = *arguments[3] ? std::fopen(arguments[3], "ab") : nullptr;
    const unsigned long latency = std::stoul(arguments[4]), words = std::stoul(arguments[5]), cycles = std::stoul(arguments[6]);
    cxxrtl_design::p_core core;
    const size_t word = sizeof(core.p_data) ? (core.p_data.bits + 7) / 8 : 0;
    struct Answer { unsigned long due; size_t address; };
    std::deque<Answer> answers;
    unsigned long now = 0, credit = 0;

    auto cycle = [&]() {
        // What the memory says in this cycle was settled by the requests before it.
        bool answered = !answers.empty() && answers.front().due <= now;
        core.p_data__valid.set<bool>(answered);
        if (answered) {
            std::memcpy(core.p_data.data, &memory[answers.front().address * word], word);
            answers.pop_front();
        }
        credit = credit + words < cycles ? credit + words : credit + words - (credit >= cycles ? words : 0);
        core.p_read__ready.set<bool>(credit >= cycles);
        core.p_write__ready.set<bool>(true);
        core.p_clk.set<bool>(false);
        core.step();
        if (core.p_read__valid.get<bool>() && credit >= cycles) {
            credit -= cycles;
            answers.push_back({now + latency, core.p_read__address.get<uint32_t>()});
        }
        if (core.p_write__valid.get<bool>())
            std::memcpy(&memory[core.p_write__address.get<uint32_t>() * word], core.p_write__data.data, word);
        if (logits && core.p_logits__valid.get<bool>())
            std::fwrite(core.p_logits.data, 1, core.p_logits.bits / 8, logits);
        core.p_clk.set<bool>(true);
        core.step();
        ++now;
    };

    core.p_program__write.set<bool>(true);
    for (size_t i = 0; i + 8 <= program.size(); i += 8) {
        uint32_t pair[2];
        std::memcpy(pair, &program[i], 8);
        core.p_program__address.set<uint16_t>(pair[0]);
        core.p_program__data.set<uint32_t>(pair[1]);
        cycle();
    }
    core.p_program__write.set<bool>(false);
    for (unsigned token; std::scanf("%u", &token) == 1;) {
        core.p_token.set<uint16_t>(token);
        core.p_start.set<bool>(true);
        const unsigned long begin = now;
        cycle();
        core.p_start.set<bool>(false);
        do cycle(); while (!core.p_idle.get<bool>());
        if (logits) std::fflush(logits);
        std::printf("%lu %u\n", now - begin, core.p_next__token.get<uint32_t>());
        std::fflush(stdout);
    }
    return 0;
}
