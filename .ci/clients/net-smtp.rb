#!/usr/bin/env ruby
# PORT MAILS FILE
require 'net/smtp'
port, mails, file = ARGV
mail = "Content-Type: text/plain; charset=utf-8\n\n" + File.binread(file)
Net::SMTP.start('127.0.0.1', port.to_i) do |smtp|
  mails.to_i.times do
    start = Process.clock_gettime(Process::CLOCK_MONOTONIC)
    smtp.send_message(mail, 'from@bench.test', 'to@bench.test')
    puts 1000 * (Process.clock_gettime(Process::CLOCK_MONOTONIC) - start)
  end
end
